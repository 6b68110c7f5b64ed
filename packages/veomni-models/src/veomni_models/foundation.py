"""Foundation models and tokenizers of the ecosystem, from a folder, a config or the keys of a YAML file."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veomni_models.errors import ModelError
from veomni_models.initialization import initialize_weights
from veomni_models.segment_attention import register_segment_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_KERNEL_ARGUMENTS = {
    *("module", "query", "key", "value", "attention_mask"),
    *("scaling", "dropout", "softcap", "sliding_window", "s_aux", "kwargs"),
}


def load_config(
    path: str | Path | None, overrides: Mapping[str, Any] = {}, part: str | None = None
) -> PreTrainedConfig:
    """The config of a folder with `overrides` on top, or one made from overrides alone (then with `model_type`).

    Args:
        path: a folder with config.json.
        overrides: keys of the config.
        part: name of the inner config that is meant if the folder's model has one (`vision_config` of a whole CLIP).

    Raises:
        ModelError: no such folder, no config.json in it, an unknown model type, or a key that the config has not.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    keys = dict(overrides)
    if path is None:
        if "model_type" not in keys:
            raise ModelError(
                f"no config folder was given, and the keys {sorted(keys)} have no model_type to start from"
            )
        kind = keys.pop("model_type")
        if kind not in CONFIG_MAPPING:
            raise ModelError(f"model_type {kind!r} is not known to transformers{_nearest(kind, CONFIG_MAPPING)}")
        try:
            _check_keys(CONFIG_MAPPING[kind](), keys)
            return _check_heads(AutoConfig.for_model(kind, **keys))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"no config of model_type {kind!r} can be made from {keys}: {one_line(error)}") from error
    _check_folder(path, "config.json")
    try:
        config = AutoConfig.from_pretrained(path)
        config = getattr(config, part or "", config)
        _check_keys(config, keys)
        return _check_heads(type(config).from_dict({**config.to_dict(), **keys}))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path}/config.json cannot be read as a model config: {one_line(error)}") from error


def _check_keys(config: PreTrainedConfig, keys: Mapping[str, Any]) -> None:
    for key in keys:
        if not hasattr(config, key) and key != "head_dim":  # which many models read though their config has it not
            raise ModelError(f"{key}: a {config.model_type} config has no such key{_nearest(key, config.to_dict())}")


def _check_heads(config: PreTrainedConfig) -> PreTrainedConfig:
    heads, kv_heads = (getattr(config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise ModelError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    return config


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {near[0]}?" if near else ""


def attention_for(attn_implementation: str | None) -> str | None:
    """The kernel's name in transformers: `auto` is the flash kernel on CUDA, segments elsewhere; None stays None."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import is_flash_attn_2_available

    if attn_implementation == "auto":
        attn_implementation = "flash_attention_2" if is_flash_attn_2_available() else "segments"
    known = ["eager", "segments", *ALL_ATTENTION_FUNCTIONS]
    if attn_implementation is not None and attn_implementation not in known and "/" not in attn_implementation:
        raise ModelError(
            f"attn_implementation {attn_implementation!r} is not registered in transformers"
            f"{_nearest(attn_implementation, known)}"
        )
    return register_segment_attention() if attn_implementation == "segments" else attn_implementation


def attention_of_parts(config: PreTrainedConfig, model_class: Any, attn_implementation: str | None) -> Any:
    """`attention_for` in the form that a model of `config` takes.

    Segments are causal, so of a model with parts only the text model gets them. Under `auto`, a model that does not
    choose its attention by name keeps what transformers picks (None).
    """
    attention = attention_for(attn_implementation)
    if attn_implementation == "auto" and not _takes_any_kernel(model_class):
        return None
    return _of_the_text_model(config, attention) if attention == "segments" else attention


def _takes_any_kernel(model_class: Any) -> bool:
    """Whether a model chooses its attention by name, hands over no more than kernels know, and asks for no mask."""
    file = sys.modules[model_class.__module__]
    eager = getattr(file, "eager_attention_forward", None)
    known = eager is None or set(inspect.signature(eager).parameters) <= _KERNEL_ARGUMENTS
    source = inspect.getsource(file)
    # a table of classes by name; layers that select keys in a mask, which must be there (DeepSeek-V3.2)
    closed = "_CLASSES[config._attn_implementation]" in source or "allow_is_causal_skip" in source
    closed = closed or any(map(_widens_its_mask, vars(file).values()))
    return known and not closed and model_class._can_set_attn_implementation()


def _widens_its_mask(found: Any) -> bool:
    """Whether it is an attention layer that adds keys of its own to the mask, which has to be there (DeepSeek-V4)."""
    if not inspect.isclass(found) or "Attention" not in found.__name__ or "forward" not in vars(found):
        return False
    source = inspect.getsource(inspect.unwrap(vars(found)["forward"]))
    return re.search(r"attention_mask = (torch\.cat|(nn\.functional|F)\.pad)\(", source) is not None


def _of_the_text_model(config: PreTrainedConfig, attention: str) -> Any:
    text = config.get_text_config(decoder=True)
    if text is config:
        return attention
    for name in type(config).sub_configs or {}:
        part = getattr(config, name, None)
        if part is not None and part.get_text_config(decoder=True) is text:
            return {name: _of_the_text_model(part, attention)}
    return attention


def auto_class_for(config: PreTrainedConfig) -> Any:
    """The auto class of transformers that builds the model of a config which writes text.

    A config with parts (vision, audio) is of a model for pictures or any modality if there is one, else a causal one.

    Raises:
        ModelError: transformers has no model of this config that writes text.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    causal = ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    multimodal = [
        ("AutoModelForImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("AutoModelForMultimodalLM", auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    ]
    parts = {name for name in type(config).sub_configs or {} if getattr(config, name, None) is not None}
    for name, known in [*multimodal, causal] if parts - {"text_config"} else [causal, *multimodal]:
        auto_class = getattr(transformers, name)
        if config.model_type in known or type(config) in auto_class._model_mapping:
            return auto_class
    raise ModelError(f"transformers has no model of model_type {config.model_type!r} that writes text")


def _class_of(auto_class: Any, config: PreTrainedConfig) -> Any:
    found = auto_class._model_mapping[type(config)]
    if not isinstance(found, tuple):
        return found
    names = {kind.__name__: kind for kind in found}
    return next((names[name] for name in config.architectures or () if name in names), found[0])


def build_foundation_model(
    config_path: str | Path | PreTrainedConfig | None = None,
    weights_path: str | Path | None = None,
    *,
    torch_dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = "auto",
    moe_implementation: str | None = "auto",
    init_device: str = "meta",
    overrides: Mapping[str, Any] = {},
    seed: int = 0,
) -> PreTrainedModel:
    """A model of transformers that writes text: of text alone, or of pictures, videos and sounds too.

    Args:
        config_path: a folder with config.json, or a config object; falls back to `weights_path`.
        weights_path: a folder with safetensors; None = random weights from `seed`.
        torch_dtype: of the parameters.
        attn_implementation: `auto`, `segments`, or any name that transformers knows.
        moe_implementation: what computes experts: `auto` and `fused` are grouped products, `eager` one expert after the
            other, or any name that transformers knows. Without effect on models that have no choice.
        init_device: `meta` gives a model without storage (shard it, then load weights or `initialize_weights`);
            any other device gives one with its weights on it.
        overrides: keys of the config that replace the folder's; with neither folder, all of them, with `model_type`.
        seed: of random weights.

    Raises:
        ModelError: a folder or its config.json is missing or cannot be used.
    """
    from transformers import PreTrainedConfig

    if isinstance(config_path, PreTrainedConfig):
        config = config_path
    else:
        config = load_config(config_path or weights_path, overrides)
    config = getattr(config, "thinker_config", config)  # of an omni model that speaks, what reads, hears and writes
    if weights_path is not None:
        _check_folder(weights_path, "config.json")
    auto_class = auto_class_for(config)
    attention = attention_of_parts(config, _class_of(auto_class, config), attn_implementation)
    if weights_path is not None and init_device != "meta":
        model = auto_class.from_pretrained(
            weights_path, config=config, dtype=torch_dtype, attn_implementation=attention
        )
        choose_experts(model, moe_implementation)
        return model.to(init_device).train()
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=torch_dtype, attn_implementation=attention)
    choose_experts(model, moe_implementation)
    if init_device != "meta":
        initialize_weights(model, seed, init_device)
    return model.train()


def choose_experts(model: PreTrainedModel, moe_implementation: str | None) -> None:
    """What computes the experts of a model, if it has a choice; see `build_foundation_model`.

    Raises:
        ModelError: a name that transformers does not know.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = {None: "grouped_mm", "auto": "grouped_mm", "fused": "grouped_mm"}.get(moe_implementation, moe_implementation)
    if name not in (known := ["eager", *ALL_EXPERTS_FUNCTIONS]):
        raise ModelError(f"moe_implementation {name!r} is not registered in transformers{_nearest(str(name), known)}")
    if any(hasattr(module, "is_transposed") and hasattr(module, "has_gate") for module in model.modules()):
        model.set_experts_implementation(name)


def build_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a folder.

    Raises:
        ModelError: the folder does not exist or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    _check_folder(path, "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ModelError(f"{path} holds no tokenizer that can be loaded: {one_line(error)}") from error


def build_processor(path: str | Path) -> Any:
    """The processor saved in a folder: of text, pictures, videos and sounds, as far as it has them.

    Raises:
        ModelError: the folder does not exist or holds no processor.
    """
    from transformers import AutoProcessor

    _check_folder(path, "tokenizer_config.json")
    try:
        return AutoProcessor.from_pretrained(path)
    except Exception as error:
        raise ModelError(f"{path} holds no processor that can be loaded: {one_line(error)}") from error


def _check_folder(path: str | Path, file: str) -> None:
    if not Path(path).is_dir():
        raise ModelError(f"{path}: no such folder (a local model folder with {file} is needed)")
    if not (Path(path) / file).is_file():
        raise ModelError(f"{path} has no {file}, so it is not a folder that save_pretrained wrote")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, short enough for one sentence of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
