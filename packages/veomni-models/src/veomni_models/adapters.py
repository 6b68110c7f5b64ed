"""Low-rank adapters of peft (LoRA, arXiv 2106.09685) on models that are made on the meta device and sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from veomni_models.errors import ModelError
from veomni_models.foundation import one_line
from veomni_models.initialization import Slot, keep_own_part, whole_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "default"


def add_adapters(model: PreTrainedModel, options: Mapping[str, Any] = {}) -> None:
    """Freeze a model and put adapters that learn beside its layers, in place. Call it before the model is sharded.

    Args:
        model: on any device; on meta the adapters are too, see `initialize_adapters`.
        options: of `peft.LoraConfig`, such as `r`, `lora_alpha`, `target_modules` (default: all linear layers but the
            head) and `target_parameters` (3-D weights of experts).

    Raises:
        ModelError: peft is not installed, it has no such option, the model has no such targets, or an option needs
            whole weights (DoRA, initialisations from weights) or trains whole modules.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelError("adapters need peft: pip install peft") from error
    if unknown := sorted(set(options) - set(LoraConfig.__dataclass_fields__)):
        raise ModelError(f"peft.LoraConfig has no {', '.join(unknown)}")
    start = options.get("init_lora_weights", True)
    if options.get("use_dora") or options.get("modules_to_save") or start not in (True, False, "gaussian"):
        raise ModelError(
            "use_dora, modules_to_save and init_lora_weights other than true, false and gaussian need whole weights, "
            "which a sharded model does not have"
        )
    default = None if options.get("target_parameters") else "all-linear"
    try:
        config = LoraConfig(**{"target_modules": default, **options})
        with next(model.parameters()).device:
            model.add_adapter(config, _NAME)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the adapters do not fit {type(model).__name__}: {one_line(error)}") from error


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(True for _ in _adapted(model))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model has the modules and names that it had before `add_adapters`: to load, draw or export it."""
    adapted = list(_adapted(model))
    for parent, name, layer in adapted:
        setattr(parent, name, layer.get_base_layer())
    try:
        yield
    finally:
        for parent, name, layer in adapted:
            setattr(parent, name, layer)


@torch.no_grad()
def initialize_adapters(model: PreTrainedModel, seed: int, device: torch.device | str | None = None) -> None:
    """Draw the adapters as peft does after `torch.manual_seed(seed)`, the same ones however the model is sharded.

    Args:
        model: with its own weights in memory; the adapters may be on the meta device.
        seed: of the random generators; the global ones are left alone.
        device: where adapters on meta get their storage.
    """
    start = model.peft_config[_NAME].init_lora_weights
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in _layers(model):
            for module, name, parameter in _own(layer):
                if parameter.is_meta:
                    empty = torch.empty_like(parameter, device=device)
                    setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
            with whole_parameters(_sharded(layer)):
                layer.reset_lora_parameters(_NAME, start)


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Add what the adapters do to the weights that they stand beside; `without_adapters` then gives the merged model.

    Of a sharded model all ranks call it: they gather the two factors of one layer at a time, and each adds its part of
    their product to its shard. The adapters stay, and add the same once more: train no further.
    """
    for layer in _layers(model):
        weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", None) or "weight")
        with whole_parameters(_sharded(layer), gather=True):
            change = layer.get_delta_weight(_NAME).detach().to(weight.dtype)
        own = torch.empty_like(weight)
        keep_own_part(change, own)
        weight.add_(own)


@torch.no_grad()
def save_adapters(model: PreTrainedModel, folder: str | Path, *, base: str | None = None, write: bool = True) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, which peft and transformers load.

    Args:
        model: sharded or not; of a sharded one all ranks call it.
        folder: made if it is not there.
        base: the folder of the model that they were trained on, to which the config refers.
        write: whether this rank writes; the others help to gather.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if write:
                tensors[f"base_model.model.{name}".replace(f".{_NAME}", "")] = whole.detach().cpu().contiguous()
    if write:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = model.peft_config[_NAME]
        config.base_model_name_or_path = base or config.base_model_name_or_path
        save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _adapted(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The parent, the name and the outermost adapted layer of every place that has one."""
    for name, child in module.named_children():
        if _is_adapted(child):
            yield module, name, child
        else:
            yield from _adapted(child)


def _layers(model: nn.Module) -> Iterator[Any]:
    """All layers of adapters; one place has several if several of its 3-D weights are adapted."""
    return filter(_is_adapted, model.modules())


def _own(layer: nn.Module) -> list[Slot]:
    """The adapter's own parameters, without those of the layer that it stands beside."""
    return [
        (module, own, parameter)
        for name, module in layer.named_modules()
        if name.startswith("lora_")
        for own, parameter in module.named_parameters(recurse=False)
    ]


def _sharded(layer: nn.Module) -> list[Slot]:
    return [slot for slot in _own(layer) if isinstance(slot[2], DTensor)]
