"""LoRA adapters, as peft names and scales them, merged into the weights that they were trained beside.

W + scale * B A, scale = lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilized LoRA
(https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732). Computed in float32 and rounded once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veomni_ckpt.assets import read_json
from veomni_ckpt.checkpoint import Checkpoint, Tensor
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.tensor_reader import TensorReader

_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B|A|B|magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
_REPLACED = re.compile(r"(?P<module>.+)\.(?:modules_to_save\.(?P<adapter>[^.]+)|original_module)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Merge:
    """What is to be added to one weight.

    Attributes:
        a, b: names in the checkpoint: A [r, in], B [out, r].
        transposed: the weight is [in, out] (embeddings, transformers' Conv1D): B A is added transposed.
        scale: factor of B A.
    """

    a: str
    b: str
    transposed: bool
    scale: float


@dataclass
class Adapters:
    """The model's tensors once adapters are merged.

    Attributes:
        names: own name -> name in the checkpoint, of all that are no adapters.
        base_names: the same in the base model's checkpoint, for those that the first one does not have.
        merges: own name of a weight -> its adapter.
    """

    names: dict[str, str] = field(default_factory=dict)
    base_names: dict[str, str] = field(default_factory=dict)
    merges: dict[str, Merge] = field(default_factory=dict)


def has_adapters(names: Mapping[str, str]) -> bool:
    """Whether there are LoRA weights among these names."""
    return any(_PART.fullmatch(name) for name in names)


def read_adapter_config(folders: Sequence[Path]) -> dict[str, Any]:
    """peft's `adapter_config.json` from the first of the folders that has one; else empty.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    for folder in folders:
        path = folder / "adapter_config.json"
        if path.is_file():
            return read_json(path)
    return {}


def plan_merge(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    base_names: Mapping[str, str],
    config: Mapping[str, Any],
    *,
    alpha: float | None = None,
    adapter: str | None = None,
) -> Adapters:
    """Sort the tensors of a checkpoint with LoRA adapters.

    Args:
        checkpoint: holds the adapters.
        names: own name -> name in it.
        base_names: the same for the checkpoint of the base model; empty if the first one holds the base weights.
        config: peft's: lora_alpha, use_rslora, alpha_pattern, fan_in_fan_out.
        alpha: replaces lora_alpha.
        adapter: which of several; None: the only one.

    Raises:
        CheckpointError: no or several adapters, no alpha, a weight that is missing, or a kind that cannot be merged.
    """
    result = Adapters()
    parts: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    for name, source in names.items():
        if match := _PART.fullmatch(name):
            if match["part"] == "magnitude_vector" or match["kind"] == "bias":
                raise CheckpointError(f"{source}: DoRA and adapters with a bias cannot be merged, plain LoRA can")
            adapters.add(match["adapter"] or "default")
            if adapter in (None, match["adapter"] or "default"):
                parts.setdefault(_plain(match["module"]), {})[match["part"]] = source
        elif match := _REPLACED.fullmatch(name):
            if match["adapter"] is not None and adapter in (None, match["adapter"]):
                result.names[f"{_plain(match['module'])}.{match['rest']}"] = source
        else:
            result.names.setdefault(_plain(name).replace(".base_layer.", "."), source)
    if not parts:
        wanted = "LoRA adapter" if adapter is None else f"LoRA adapter {adapter!r}"
        has = f"; it has {', '.join(sorted(adapters))}" if adapters else ""
        raise CheckpointError(f"{checkpoint.path} has no {wanted} to merge{has}")
    if adapter is None and len(adapters) > 1:
        raise CheckpointError(f"{checkpoint.path} has the adapters {', '.join(sorted(adapters))}: say which to merge")
    result.base_names = {name: source for name, source in base_names.items() if name not in result.names}
    for module, sources in parts.items():
        weight = f"{module}.weight"
        embedding = "embedding_A" in sources
        pair = [sources.get(("embedding_" if embedding else "") + part) for part in "AB"]
        if pair[0] is None or pair[1] is None:
            raise CheckpointError(f"{checkpoint.path} has only one half of the adapter of {module}")
        if weight not in result.names and weight not in result.base_names:
            raise CheckpointError(
                f"{checkpoint.path} has an adapter for {weight} and not that weight: give the base model"
            )
        rank = checkpoint.tensors[pair[0]].shape[0] if checkpoint.tensors[pair[0]].shape else 0
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        result.merges[weight] = Merge(pair[0], pair[1], transposed, _scale(module, rank, config, alpha))
    return result


def _plain(module: str) -> str:
    return module.removeprefix("base_model.model.")


def _scale(module: str, rank: int, config: Mapping[str, Any], alpha: float | None) -> float:
    if alpha is None:
        patterns = config.get("alpha_pattern")
        own = patterns if isinstance(patterns, dict) else {}
        alpha = next((value for pattern, value in own.items() if _fits(pattern, module)), config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        raise CheckpointError("the scale of the LoRA adapter is unknown: give lora_alpha, or an adapter_config.json")
    if rank < 1:
        raise CheckpointError(f"the adapter of {module} has the rank {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fits(pattern: str, module: str) -> bool:
    """As in peft: a pattern fits the end of a module's name, with ^ before it the whole."""
    plain = pattern.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.-]+", plain):  # peft takes any regular expression; one of a stranger may run for ever
        raise CheckpointError(
            f"alpha_pattern of adapter_config.json has {pattern!r}, which is no name: give lora_alpha"
        )
    return module == plain or (not pattern.startswith("^") and module.endswith("." + plain))


def check_merge(checkpoint: Checkpoint, merge: Merge, weight: Tensor) -> None:
    """Check that an adapter fits its weight.

    Raises:
        CheckpointError: other shapes, or elements that are no floating-point numbers.
    """
    a, b = checkpoint.tensors[merge.a], checkpoint.tensors[merge.b]
    shapes = [list(tensor.shape) for tensor in (weight, a, b)]
    if any(len(shape) != 2 for shape in shapes):
        raise CheckpointError(f"{merge.a} belongs to a weight of the shape {shapes[0]}: only matrices can be merged")
    whole = [b.shape[0], a.shape[1]]
    if a.shape[0] != b.shape[1] or (whole[::-1] if merge.transposed else whole) != shapes[0]:
        raise CheckpointError(f"{merge.a} {shapes[1]} and {merge.b} {shapes[2]} do not fit {weight.name} {shapes[0]}")
    if not all(tensor.dtype.is_floating for tensor in (weight, a, b)):
        raise CheckpointError(f"{weight.name} or its adapter is of whole numbers: it cannot be merged")


def merger(checkpoint: Checkpoint, merge: Merge, weight: Tensor) -> Callable[[int, Any], Any]:
    """A function (first row, rows of the weight as float32 [n, columns]) -> the rows with the adapter added."""
    a, b = _matrix(checkpoint, merge.a), _matrix(checkpoint, merge.b)
    left, right = (a.T, b.T) if merge.transposed else (b, a)

    def add(first: int, rows: Any) -> Any:
        return rows + (left[first : first + len(rows)] @ right) * merge.scale

    return add


def _matrix(checkpoint: Checkpoint, name: str) -> Any:
    """A whole small matrix as float32."""
    from veomni_ckpt.casting import to_float32

    tensor = checkpoint.tensors[name]
    reader = TensorReader(checkpoint, tensor)
    raw = memoryview(bytearray(reader.nbytes))
    reader.read(0, reader.nbytes, raw)
    return to_float32(raw, tensor.dtype).reshape(tensor.shape)
