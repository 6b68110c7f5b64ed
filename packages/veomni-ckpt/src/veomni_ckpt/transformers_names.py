"""Names and weights of a transformers model as its Hugging Face folders have them.

transformers keeps some models in another form than their files: experts of a layer in one tensor, renamed keys. Its own
tables and operations (`transformers.conversion_mapping`, `transformers.core_model_loading`) are run here on lazy
tensors, both ways. transformers is imported only if the model comes from there.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.lazy_tensors import LazyTensor
from veomni_ckpt.names import some, unwrap


@dataclass
class Converted:
    """What the tensors of a folder are in the model.

    Attributes:
        values: by the model's names.
        origins: the model's name -> names in the folder that its value is made of.
        unexpected: names that belong nowhere in the model.
    """

    values: dict[str, LazyTensor]
    origins: dict[str, list[str]]
    unexpected: list[str]


def is_from_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def author_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fully_shard` gave it one of its own."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def skeleton(module: nn.Module) -> Any:
    """The module as its author wrote it, without wrappers and values: parameters of whole shapes on the meta device."""
    module = unwrap(module)
    cls: Any = author_class(module)
    bare = cls.__new__(cls)
    bare.__dict__.update(module.__dict__)
    bare._parameters = {
        name: p if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    bare._buffers = {
        name: b if b is None else torch.empty(b.shape, dtype=b.dtype, device="meta")
        for name, b in module._buffers.items()
    }
    bare._modules = {name: child if child is None else skeleton(child) for name, child in module._modules.items()}
    return bare


def convert_on_load(model: nn.Module, wanted: Mapping[str, torch.Tensor], stored: dict[str, LazyTensor]) -> Converted:
    """The values of a model's tensors, as `from_pretrained` makes them of a folder's.

    The model keeps a note of what was converted, as after `from_pretrained`: `convert_on_save` reverts it.

    Args:
        model: of any kind; one that is not of transformers has the folder's names.
        wanted: its parameters and persistent buffers by name.
        stored: the folder's tensors.

    Raises:
        CheckpointError: naming the tensor that cannot be converted.
    """
    inner = unwrap(model)
    if not is_from_transformers(inner):
        values = {name: value for name, value in stored.items() if name in wanted}
        return Converted(values, {name: [name] for name in values}, sorted(stored.keys() - values.keys()))
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    bare = skeleton(inner)
    transforms = get_model_conversion_mapping(bare)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = bare.base_model_prefix
    planned: dict[str, Any] = {}
    result = Converted({}, {}, [])
    with torch.no_grad():
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:  # saved under the model's own name
                target, pattern = rename_source_key(name, [], [], prefix, wanted)
            if target not in wanted:
                result.unexpected.append(name)
                continue
            if pattern is None:
                result.values.setdefault(target, stored[name])
                result.origins.setdefault(target, [name])
            else:
                if target not in planned:
                    planned[target] = copy.deepcopy(by_pattern[pattern])
                planned[target].add_tensor(target, name, pattern, stored[name])
        for target, transform in planned.items():
            names = sorted(set().union(*transform.layer_targets.values()), key=dot_natural_key)
            try:
                made = transform.convert(target, model=bare, config=bare.config)
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"{target} cannot be made of {names[0]} and its like: {reason}") from error
            for name, value in made.items():
                result.values[name] = value[0] if isinstance(value, list) else value
                result.origins[name] = names
    # as from_pretrained does: what is exported later has the form that was loaded
    inner._weight_conversions = [transform for transform in transforms if transform.was_used()]
    return result


def convert_on_save(model: nn.Module, state: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a folder, as `save_pretrained` makes them of a model's; those of any other model stay."""
    inner = unwrap(model)
    if not is_from_transformers(inner):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    bare = skeleton(inner)
    ignored = set(bare._keys_to_ignore_on_save or ())
    with torch.no_grad():
        saved: dict[str, LazyTensor] = revert_weight_conversion(
            bare, {name: tensor for name, tensor in state.items() if name not in ignored}
        )
    return saved


def without_expected(model: nn.Module, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Missing and unexpected names without those that the model's class says are nothing to report."""
    inner = unwrap(model)
    if not is_from_transformers(inner):
        return missing, unexpected
    keys: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    skeleton(inner)._adjust_missing_and_unexpected_keys(keys)
    return keys.missing_keys, keys.unexpected_keys


@torch.no_grad()
def restore_buffers(model: nn.Module) -> None:
    """Compute the buffers of a transformers model that are in no file, such as rotary frequencies, and nothing else.

    Raises:
        CheckpointError: the model's class has no rule for one.
    """
    kept = [*model.parameters()]
    missing: dict[str, torch.Tensor] = {}
    settled = []
    for path, module in model.named_modules():
        own = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        computed = {name: own[name] for name in own if name in module._non_persistent_buffers_set}
        kept += [buffer for name, buffer in own.items() if name not in computed]
        missing |= {f"{path}.{name}": buffer for name, buffer in computed.items() if buffer.is_floating_point()}
        if not computed:
            settled.append(module)
    for buffer in missing.values():
        buffer.fill_(math.nan)
    marked: list[Any] = [*kept, *settled]
    for one in marked:
        one._is_hf_initialized = True
    unwrap(model).initialize_weights()
    for one in [*kept, *model.modules()]:
        one.__dict__.pop("_is_hf_initialized", None)
    if empty := [name for name, buffer in missing.items() if buffer.isnan().all()]:
        raise CheckpointError(f"{some(empty)} of the model is on the meta device, and no rule of transformers fills it")
