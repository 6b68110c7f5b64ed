"""Vision and audio towers of multimodal models: the ranks of a row share its pictures and sounds.

Under Ulysses every rank is handed the whole row, pictures and sounds too. Here a rank computes some of them in its
towers, and all ranks are given all features. It works for any tower of transformers: what belongs to an item is read
off its arguments. Items lie one after the other (pictures of Qwen-VL with their grids, sounds with their lengths), or
one to each entry of a batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from veomni_parallel.all_to_all import all_to_all
from veomni_parallel.errors import ParallelError
from veomni_parallel.mesh import Mesh
from veomni_parallel.packed_rows import decoder_of, named_arguments
from veomni_parallel.sound_padding import SAMPLES, keep_sounds_apart


@dataclass(frozen=True)
class Items:
    """The pictures or sounds in the arguments of a tower."""

    sizes: tuple[int, ...]
    """Entries of each item along `dim` of the input: patches, frames, or 1 in a batch."""
    dim: int
    packed: bool
    """Whether items lie one after the other, rather than one to an entry."""


def find_towers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models beside the decoder that take pictures, videos or sounds, by name."""
    decoder = decoder_of(model)
    towers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        beside = name and decoder not in module.modules() and not any(name.startswith(f"{t}.") for t in towers)
        if beside and hasattr(module, "main_input_name") and module not in decoder.modules() and tower_inputs(module):
            towers[name] = module
    return towers


def tower_inputs(tower: nn.Module) -> set[str]:
    """What a tower takes: some of "pixel_values" (pictures and videos) and "input_features" (sounds)."""
    modalities = getattr(tower, "input_modalities", ())
    kinds = {modalities} if isinstance(modalities, str) else set(modalities)
    names = set(inspect.signature(_unwrapped(tower).forward).parameters)
    inputs = set()
    if kinds & {"image", "video"} or "pixel_values" in names:
        inputs.add("pixel_values")
    if "audio" in kinds or "input_features" in names:
        inputs.add("input_features")
    return inputs


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside an FSDP1 wrapper, whose own forward names no argument."""
    return getattr(module, "_fsdp_wrapped_module", module)


def share_towers(model: nn.Module, mesh: Mesh) -> None:
    """Divide the pictures and sounds of a row over the ranks that share it; the features are whole on all of them.

    Each tower's forward is replaced on the instance. A rank that is dealt nothing computes one item and gives nothing,
    so that collectives of a sharded tower stay in step. Towers whose items cannot be told apart are computed by every
    rank. With one rank nothing is shared; sounds are kept apart in any case (`keep_sounds_apart`).
    `build_parallelize_model` calls this.

    Args:
        model: a transformers model with a decoder and towers beside it.
        mesh: the ranks that share each row.
    """
    for tower in find_towers(model).values():
        keep_sounds_apart(model, tower)
        if mesh.size() > 1:
            tower.forward = _shared(tower, mesh)


def _shared(tower: nn.Module, mesh: Mesh) -> Callable[..., Any]:
    forward = tower.forward
    group, ranks, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()

    @functools.wraps(forward)
    def shared(*args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **kwargs}
        items = find_items(named)
        if items is None:
            return forward(*args, **kwargs)
        own = deal_groups(items.sizes, named.get(SAMPLES), ranks)[rank]
        idle = own.start == own.stop
        output = forward(**take_items(named, items, slice(0, 1) if idle else own))
        return _join(output, idle, group)

    return shared


def find_items(arguments: dict[str, Any]) -> Items | None:
    """How many items a tower was handed and where they lie; None if that cannot be told.

    The input is the first tensor of floats. A table of integers whose rows' products sum to its length is a table of
    grids, a list of integers that sum to one of its dimensions one of lengths; else its first dimension is a batch.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.ndim}
    x = next((value for value in tensors.values() if value.is_floating_point()), None)
    if x is None:
        return None
    items = None
    for value in tensors.values():
        if value.is_floating_point() or value.dtype == torch.bool or items is not None:
            continue
        if value.ndim == 2 and value.shape[1] in (2, 3):
            sizes = value.prod(-1).tolist()
            items = Items(tuple(sizes), 0, True) if sum(sizes) == x.shape[0] else None
        elif value.ndim == 1 and x.ndim == 2:
            sizes = value.tolist()
            dims = [dim for dim in (1, 0) if sum(sizes) == x.shape[dim]]
            items = Items(tuple(sizes), dims[0], True) if dims else None
    if items is None and x.ndim > 2:
        items = Items((1,) * x.shape[0], 0, False)
        if any(value is not x and value.ndim == 2 and value.shape == (x.shape[0], 2) for value in tensors.values()):
            return None  # pictures of their own sizes: their features may come in one row
    if items is None or not items.sizes or min(items.sizes) < 1:
        return None
    known = (len(items.sizes), x.shape[items.dim])
    if any(value is not x and value.shape[0] not in known for value in tensors.values()):
        return None  # a tensor that belongs to no item
    return items


def deal(sizes: Sequence[int], ranks: int) -> list[slice]:
    """Divide items into `ranks` runs of neighbours whose largest is as small as can be; the last ones may be empty."""

    def cut(limit: int) -> list[slice]:
        runs, start, load = [], 0, 0
        for index, size in enumerate(sizes):
            if load + size > limit:
                runs.append(slice(start, index))
                start, load = index, 0
            load += size
        return [*runs, slice(start, len(sizes))]

    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= ranks else (middle + 1, high)
    runs = cut(low)
    return runs + [slice(len(sizes), len(sizes))] * (ranks - len(runs))


def deal_groups(sizes: Sequence[int], groups: torch.Tensor | None, ranks: int) -> list[slice]:
    """As `deal`, with neighbours of one group [n] kept together."""
    if groups is None:
        return deal(sizes, ranks)
    counts: list[int] = groups.unique_consecutive(return_counts=True)[1].tolist()
    ends = [0, *accumulate(counts)]
    runs = deal([sum(sizes[a:b]) for a, b in pairwise(ends)], ranks)
    return [slice(ends[run.start], ends[run.stop]) for run in runs]


def take_items(arguments: dict[str, Any], items: Items, own: slice) -> dict[str, Any]:
    """The arguments of a tower for some of its items."""
    ends = [0, *accumulate(items.sizes)]
    entries, total = slice(ends[own.start], ends[own.stop]), ends[-1]
    taken, seen_input = {}, False
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            if value.is_floating_point() and not seen_input:
                seen_input = True
                value = value[:, entries] if items.dim == 1 else value[entries]
            elif value.shape[0] == len(items.sizes):
                value = value[own]
            elif value.shape[0] == total:
                value = value[entries]
        elif isinstance(value, list | tuple) and len(value) == len(items.sizes):
            value = value[own]
        taken[name] = value
    return taken


def _join(output: Any, idle: bool, group: Any) -> Any:
    """The output of a tower with each tensor joined over the ranks along its first dimension."""
    leaves: list[torch.Tensor] = []
    _map(output, leaves.append)
    if not leaves:
        return output
    counts = torch.tensor([0 if idle else len(leaf) for leaf in leaves], device=leaves[0].device)
    of_ranks = [torch.empty_like(counts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, counts, group=group)
    sizes = torch.stack(of_ranks, dim=1).tolist()  # [leaves, P]
    joined = iter([_gather(leaf, rows, idle, group) for leaf, rows in zip(leaves, sizes, strict=True)])
    return _map(output, lambda _: next(joined))


def _map(value: Any, replace: Callable[[torch.Tensor], Any]) -> Any:
    """Replace all tensors of floats with a dimension, in dictionaries (a ModelOutput is one), tuples and lists."""
    if isinstance(value, torch.Tensor):
        return replace(value) if value.is_floating_point() and value.ndim else value
    if isinstance(value, dict):
        replaced = {name: _map(inside, replace) for name, inside in value.items()}
        return type(value)(**replaced)
    if isinstance(value, tuple | list):
        return type(value)(_map(inside, replace) for inside in value)
    return value


def _gather(x: torch.Tensor, rows: list[int], idle: bool, group: Any) -> torch.Tensor:
    """[n_own, ...] -> [n, ...]; backward sums over ranks what each has for the same item."""
    own = x[:0] if idle else x
    return all_to_all(torch.cat([own] * len(rows)), [len(own)] * len(rows), rows, group)


def keep_towers_in_step(model: nn.Module, mesh: Mesh) -> None:
    """Run the towers of a sharded model equally often, and in the same order, on all ranks of `mesh`.

    A tower gathers its parameters when it runs, so a rank whose row has no pictures would leave the others waiting.
    Before each forward the ranks tell each other which inputs they have; what only others have, a rank computes for an
    empty picture or a moment of silence, at the place where the model would have, and adds nothing of it to its row.
    A model with the attribute `runs_every_tower` does so by itself in training, and is left to it there.
    `build_parallelize_model` calls this for the sharded modes, after wrapping: a tower that was skipped has to run
    before the wrapper of the next one gathers its parameters.
    """
    towers = find_towers(model).values()
    # in the order of the model's arguments, which is the order in which models compute them
    slots = [
        (name, tower)
        for name in inspect.signature(_unwrapped(model).forward).parameters
        for tower in towers
        if name.removesuffix("_videos") in tower_inputs(tower)
    ]
    if slots and mesh.size() > 1:
        turns = _Turns(slots, mesh)
        model.register_forward_pre_hook(turns.begin, prepend=True, with_kwargs=True)
        for tower in {id(tower): tower for _, tower in slots}.values():
            tower.register_forward_pre_hook(turns.before_tower, prepend=True)
            tower.register_forward_hook(turns.after_tower)
        decoder_of(model).register_forward_pre_hook(turns.before_decoder, prepend=True, with_kwargs=True)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, modules are in evaluation mode, but each rank still runs every tower that others may need it for.

    For forwards of a wrapped model outside of training, such as a validation: a model with the attribute
    `runs_every_tower` keeps its own `training`, by which it does so; its parts evaluate.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    for module in training:
        if getattr(module, "runs_every_tower", False):
            module.training = True
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Turns:
    """Which towers still have to run in this forward; hooks of the model, its towers and its decoder."""

    def __init__(self, slots: list[tuple[str, nn.Module]], mesh: Mesh) -> None:
        self.slots, self.mesh = slots, mesh
        self.present: list[int] = []
        """Slots whose input this rank has, until its tower runs."""
        self.missing: list[int] = []
        """Slots whose input other ranks have, until this rank's tower ran for nothing."""
        self.uneven: list[nn.Module] = []
        """Towers that have input on some ranks only."""
        self.nothing: list[torch.Tensor] = []
        """Zeros by which the row depends on all that uneven towers gave."""
        self.own = False

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out what this rank's row and the others' have."""
        self.present, self.missing, self.uneven, self.nothing = [], [], [], []
        if model.training and getattr(model, "runs_every_tower", False):
            return
        kwargs = named_arguments(_unwrapped(model), args, kwargs)
        own = [kwargs.get(name) is not None for name, _ in self.slots]
        flags = torch.tensor([own, [not here for here in own]], dtype=torch.int32, device=self.mesh.device_type)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        some, lacking = flags.tolist()
        self.present = [slot for slot, here in enumerate(own) if here]
        self.missing = [slot for slot, here in enumerate(own) if some[slot] and not here]
        self.uneven = [tower for slot, (_, tower) in enumerate(self.slots) if some[slot] and lacking[slot]]

    def before_tower(self, tower: nn.Module, args: Any) -> None:
        """The model runs a tower: first run what it skipped."""
        if self.own:
            return
        slots = [slot for slot in self.present if self.slots[slot][1] is tower]
        if slots:
            self.present.remove(slots[0])
            self._catch_up(slots[0])
        else:  # a model that runs its towers for rows without pictures by itself
            self.missing = [slot for slot in self.missing if self.slots[slot][1] is not tower]

    def after_tower(self, tower: nn.Module, args: Any, output: Any) -> None:
        """Backward must reach the same parts of a tower on all ranks, also those of which the model uses nothing."""
        if any(tower is uneven for uneven in self.uneven):
            leaves: list[torch.Tensor] = []
            _map(output, leaves.append)
            self.nothing += [0.0 * leaf.float().sum() for leaf in leaves]

    def before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run what is left, and let the row depend on it, so that gradients are in step too."""
        self._catch_up(len(self.slots))
        if not self.nothing:
            return None
        kwargs = named_arguments(_unwrapped(decoder), args, kwargs)
        if kwargs.get("inputs_embeds") is None:
            embedding = decoder.get_input_embeddings()
            kwargs["inputs_embeds"] = embedding(kwargs.pop("input_ids"))
        embeds = kwargs["inputs_embeds"]
        kwargs["inputs_embeds"] = embeds + torch.stack(self.nothing).sum().to(embeds.dtype)
        self.nothing = []
        return (), kwargs

    def _catch_up(self, slot: int) -> None:
        """Run what is missing before a slot."""
        while self.missing and self.missing[0] < slot:
            tower = self.slots[self.missing.pop(0)][1]
            self.own = True
            try:
                tower(**empty_input(tower))
            finally:
                self.own = False


def empty_input(tower: nn.Module) -> dict[str, Any]:
    """Arguments of a tower for one small item of zeros.

    Raises:
        ParallelError: the tower's config does not tell the shape of its input.
    """
    config: Any = getattr(tower, "config", None)
    names = list(inspect.signature(_unwrapped(tower).forward).parameters)
    parameter = next(tower.parameters())
    options: dict[str, Any] = {"device": parameter.device}
    grid = next((name for name in names if name.startswith("grid_")), None)
    try:
        if grid is not None:
            # patches are rows, as wide as the weight of the first layer takes them
            side = getattr(config, "spatial_merge_size", 1)
            patch = getattr(config, "temporal_patch_size", 1) * config.patch_size**2
            channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", None) or 3
            x = torch.zeros(side**2, channels * patch, dtype=parameter.dtype, **options)
            return {names[0]: x, grid: torch.tensor([[1, side, side]], **options)}
        if "feature_lens" in names:
            frames = 2 * config.n_window
            x = torch.zeros(config.num_mel_bins, frames, dtype=parameter.dtype, **options)
            lengths = torch.tensor([frames], **options)
            after = {"aftercnn_lens": (lengths - 1) // 2 + 1} if "aftercnn_lens" in names else {}
            return {"input_features": x, "feature_lens": lengths, **after}
        if "pixel_values" in names:
            side, channels = config.image_size, getattr(config, "num_channels", 3)
            height, width = side if isinstance(side, list | tuple) else (side, side)
            return {"pixel_values": torch.zeros(1, channels, height, width, dtype=parameter.dtype, **options)}
        frames = 2 * config.max_source_positions
        return {names[0]: torch.zeros(1, config.num_mel_bins, frames, dtype=parameter.dtype, **options)}
    except (AttributeError, TypeError) as error:
        raise ParallelError(
            f"This rank's row has no input for {type(tower).__name__}, other ranks' rows have, and its config does not"
            ' tell the shape of an empty one: give each rank a row with one, or use mode="ddp".'
        ) from error
