"""Which tensors of a checkpoint are the model's, and what they are called in its author's code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from veomni_ckpt.checkpoint import Checkpoint
from veomni_ckpt.errors import CheckpointError

# keys under which trainers nest the model's state dict
_MODEL_KEYS = {"model", "module", "app", "model_state", "model_state_dict", "state_dict"}
# keys under which they keep what is not the model
_OPTIMIZER_KEYS = {"optimizer", "optimizers", "optim", "optimizer_state", "optimizer_states", "optimizer_state_dict"}
_OTHER_KEYS = _OPTIMIZER_KEYS | {
    *("scheduler", "schedulers", "lr_scheduler", "lr_schedulers", "scaler", "grad_scaler"),
    *("extra_state", "train_state", "trainer_state", "progress", "rng", "rng_state", "rng_states", "random_states"),
    *("dataloader", "dataloaders", "loader", "sampler"),
}
# what wrappers insert into names: torch.compile, FSDP1, activation checkpointing
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# what the first names of a model with a head of its own look like once a prefix `model.` is off
_OWN_NAMES = ("model.", "lm_head.", "foundation.", "encoders.", "base_model.")


def model_names(checkpoint: Checkpoint, root: str | None = None) -> dict[str, str]:
    """The model's own name of each of its tensors -> its name in the checkpoint.

    Optimizer state, extra state and what else trainers save beside the model are left out. Prefixes that trainers and
    wrappers put before a name (`model.`, `app.`, `module.`, `_orig_mod.`, ...) are taken off, as far as the nesting of
    the saved state dict, or the names themselves, show that they are such.

    Args:
        checkpoint: of any format; the names of Hugging Face folders and files stay as they are.
        root: where the model is, such as "app.model"; None: found.

    Raises:
        CheckpointError: no model is found, more than one, or two tensors would get one name.
    """
    if root is not None:
        prefix = root.rstrip(".") + "." if root else ""
        chosen = {name: name[len(prefix) :] for name in checkpoint.tensors if name.startswith(prefix)}
        if not chosen:
            raise CheckpointError(f"{checkpoint.path} has no tensor below {root!r}: {_places(checkpoint)}")
    elif checkpoint.kind.startswith(("DCP", "safetensors shards")):
        chosen = _choose(checkpoint)
    else:
        return {name: name for name in checkpoint.tensors}
    chosen = {name: own for name, own in chosen.items() if own.rpartition(".")[2] != "_extra_state"}
    return _invert(checkpoint, dict(zip(chosen, strip_prefixes(chosen.values()), strict=True)))


def _choose(checkpoint: Checkpoint) -> dict[str, str]:
    paths = {name: _path(checkpoint, name) for name in checkpoint.tensors}
    paths = {name: path for name, path in paths.items() if not _OTHER_KEYS.intersection(path[:-1])}
    roots = {root for path in paths.values() if (root := _root(path))}
    shortest = {root for root in roots if len(root) == min(map(len, roots))}
    if len(shortest) > 1:
        names = " and ".join(sorted(".".join(root) for root in shortest))
        raise CheckpointError(f"{checkpoint.path} has more than one model, at {names}: say which with root")
    root = shortest.pop() if shortest else ()
    chosen = {name: ".".join(path[len(root) :]) for name, path in paths.items() if path[: len(root)] == root}
    if not chosen:
        raise CheckpointError(f"{checkpoint.path} has no tensor that is a model's: {_places(checkpoint)}")
    return chosen


def _path(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """The keys that lead to a tensor. Without the planner's note, an optimizer's names are known by their beginning."""
    path = tuple(str(key) for key in checkpoint.paths.get(name, ()))
    if path and ".".join(path) == name:
        return path
    first, _, rest = name.partition(".")
    return (first, rest) if rest and first in _OPTIMIZER_KEYS else (name,)


def _root(path: tuple[str, ...]) -> tuple[str, ...]:
    """The keys up to the model's state dict, if the path goes through one."""
    root: tuple[str, ...] = ()
    for number, key in enumerate(path[:-1]):
        if key in _MODEL_KEYS:
            root = path[: number + 1]
        elif root:
            break
    return root


def _places(checkpoint: Checkpoint) -> str:
    first = sorted({name.partition(".")[0] for name in checkpoint.tensors})
    return f"its names begin with {', '.join(first[:5])}" if first else "it has none at all"


def strip_prefixes(names: Iterable[str]) -> list[str]:
    """The names without what wrappers inserted, and without a prefix that all share and no model has."""
    result = list(names)
    for wrapper in _WRAPPERS:
        result = [name.replace(wrapper, "") for name in result]
    while result:
        prefix = result[0].partition(".")[0] + "."
        if not all(name.startswith(prefix) and len(name) > len(prefix) for name in result):
            break
        stripped = [name[len(prefix) :] for name in result]
        is_wrapper = prefix in ("module.", "app.")
        is_root = prefix == "model." and any(name.startswith(_OWN_NAMES) for name in stripped)
        if not is_wrapper and not is_root:
            break
        result = stripped
    return result


def apply_key_map(names: Mapping[str, str], key_map: Mapping[str, str | None]) -> dict[str, str]:
    """Rename by globs: `{"backbone.*": "model.*", "*.rotary.inv_freq": None}`; the first that fits counts.

    Args:
        names: new name -> source name.
        key_map: glob -> replacement, whose `*` are what the glob's `*` stood for, in order; None drops the tensor.

    Raises:
        CheckpointError: a glob that fits nothing, more `*` in a replacement than in its glob, or two equal new names.
    """
    rules = []
    for glob, replacement in key_map.items():
        if replacement is not None and replacement.count("*") > glob.count("*"):
            raise CheckpointError(f"the key map {glob!r} -> {replacement!r} has more * on the right than on the left")
        pattern = re.compile("(.*)".join(map(re.escape, glob.split("*"))), re.DOTALL)
        rules.append((glob, pattern, replacement))
    used: set[str] = set()
    result: dict[str, str] = {}
    for name, source in names.items():
        new: str | None = name
        for glob, pattern, replacement in rules:
            if match := pattern.fullmatch(name):
                used.add(glob)
                new = None if replacement is None else _fill(replacement, match.groups())
                break
        if new is None:
            continue
        if new in result:
            raise CheckpointError(f"{source} and {result[new]} would both be called {new}")
        result[new] = source
    if unused := [glob for glob in key_map if glob not in used]:
        example = next(iter(names), "")
        raise CheckpointError(f"the key map's {unused[0]!r} fits no tensor; names look like {example}")
    return result


def _fill(replacement: str, groups: tuple[str, ...]) -> str:
    parts = replacement.split("*")
    return "".join(part + group for part, group in zip(parts, (*groups[: len(parts) - 1], ""), strict=True))


def _invert(checkpoint: Checkpoint, own_names: Mapping[str, str]) -> dict[str, str]:
    result: dict[str, str] = {}
    for name, own in own_names.items():
        if own in result:
            raise CheckpointError(f"{checkpoint.path}: {result[own]} and {name} would both be called {own}")
        result[own] = name
    return result
