"""Who computes what with whom: the sizes of each kind of parallelism and the device meshes behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from veomni_parallel.errors import ParallelError


@dataclass(frozen=True)
class ParallelSizes:
    """Resolved sizes; their product is `world_size`."""

    world_size: int
    dp_replicate: int
    dp_shard: int
    ulysses: int

    @property
    def dp(self) -> int:
        """Number of ranks that read different samples: replicas x shards."""
        return self.dp_replicate * self.dp_shard


def resolve_sizes(world_size: int, dp_replicate: int = 1, dp_shard: int = -1, ulysses: int = 1) -> ParallelSizes:
    """The arithmetic of `init_parallel_state`, without processes, for planning.

    world_size = dp_replicate x dp_shard x ulysses; at most one of the three is -1 and is derived from the others.

    Raises:
        ParallelError: a size is neither positive nor -1, several are -1, or the product is not `world_size`.
    """
    sizes = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "ulysses": ulysses}
    given = f"world_size={world_size}, " + ", ".join(f"{name}={size}" for name, size in sizes.items())
    if world_size < 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ParallelError(f"Parallel sizes are positive integers (or -1 to derive one): {given}.")
    derived = [name for name, size in sizes.items() if size == -1]
    if len(derived) > 1:
        raise ParallelError(f"Only one parallel size can be derived, but {' and '.join(derived)} are -1: {given}.")
    product = 1
    for size in sizes.values():
        product *= max(size, 1)
    if derived:
        if world_size % product:
            raise ParallelError(
                f"{product} ranks of the given sizes do not divide the world, so {derived[0]}=-1 has no value: {given}."
            )
        sizes[derived[0]] = world_size // product
    elif product != world_size:
        raise ParallelError(
            f"dp_replicate x dp_shard x ulysses = {product} ranks, but there are {world_size}: {given}."
        )
    return ParallelSizes(world_size, **sizes)


@dataclass(frozen=True)
class LocalMesh:
    """The mesh of a process that is alone and has no process group; answers as a `DeviceMesh` of size 1 does."""

    device_type: str

    def size(self) -> int:
        """Always 1."""
        return 1

    def get_local_rank(self) -> int:
        """Always 0."""
        return 0

    def get_group(self, mesh_dim: int | str | None = None) -> None:
        """There is none; every function of this package takes a mesh of size 1 without communicating."""
        return


Mesh: TypeAlias = DeviceMesh | LocalMesh


@dataclass(frozen=True)
class ParallelState:
    """Meshes of one run, handed on to whoever needs them; never global.

    `dp`, `sp` and `loss` are one-dimensional. `fsdp` is what `fully_shard` takes: one-dimensional, or
    (replicate, shard) for HSDP. All answer `.size()`; `dp`, `sp` and `loss` also `.get_local_rank()`, `.get_group()`.
    """

    sizes: ParallelSizes
    device_type: str
    rank: int
    dp: Mesh
    """Ranks that read different samples: replicate x shard."""
    fsdp: Mesh
    """Ranks that share the parameters: shard x sp, under replicate if there are replicas."""
    sp: Mesh
    """Ranks that share each row of tokens (Ulysses); neighbours, so that they lie in one node."""
    loss: Mesh
    """All ranks that hold different tokens: dp x sp."""

    @property
    def device(self) -> torch.device:
        """This rank's device: the current one of `device_type`."""
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.device_type, torch.accelerator.current_device_index())

    def describe(self) -> str:
        """A drawing of the ranks: one line per data-parallel rank, its Ulysses ranks side by side."""
        s = self.sizes
        width = len(str(s.world_size - 1))
        lines = [
            f"{s.world_size} rank{'s' * (s.world_size > 1)} on {self.device_type}"
            f" = {s.dp_replicate} replicate x {s.dp_shard} shard x {s.ulysses} ulysses; this is rank {self.rank}"
        ]
        for dp in range(s.dp):
            row = range(dp * s.ulysses, (dp + 1) * s.ulysses)
            ranks = " ".join(f"[{r:>{width}}]" if r == self.rank else f" {r:>{width}} " for r in row)
            lines.append(f"  replica {dp // s.dp_shard}  shard {dp % s.dp_shard}  ranks {ranks}".rstrip())
        return "\n".join(lines)


def init_parallel_state(
    dp_replicate: int = 1, dp_shard: int = -1, ulysses: int = 1, device_type: str | None = None
) -> ParallelState:
    """Build the meshes of this run. Call it on every rank after `torch.distributed.init_process_group`.

    Ranks are numbered replicate-major, Ulysses-minor: the ranks that share a row are neighbours, replicas lie furthest
    apart. Without a process group the result is the state of one process.

    Args:
        dp_replicate: copies of the sharded model (HSDP).
        dp_shard: data-parallel ranks that share one copy of the parameters.
        ulysses: ranks that share each row; parameters are sharded over them too.
        device_type: "cpu", "cuda", ...; None: "cpu" under gloo, otherwise the accelerator that torch finds.

    Raises:
        ParallelError: the sizes do not fit the number of ranks.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if device_type is None:
        on_accelerator = torch.accelerator.is_available() and not (distributed and dist.get_backend() == "gloo")
        device_type = torch.accelerator.current_accelerator().type if on_accelerator else "cpu"
    sizes = resolve_sizes(dist.get_world_size() if distributed else 1, dp_replicate, dp_shard, ulysses)
    if not distributed:
        alone = LocalMesh(device_type)
        return ParallelState(sizes, device_type, rank=0, dp=alone, fsdp=alone, sp=alone, loss=alone)

    rows: Any = init_device_mesh(device_type, (sizes.dp, sizes.ulysses), mesh_dim_names=("dp", "sp"))
    shards: Any = init_device_mesh(
        device_type,
        (sizes.dp_replicate, sizes.dp_shard * sizes.ulysses),
        mesh_dim_names=("replicate", "shard"),
    )
    return ParallelState(
        sizes,
        device_type,
        rank=dist.get_rank(),
        dp=rows["dp"],
        fsdp=shards if sizes.dp_replicate > 1 else shards["shard"],
        sp=rows["sp"],
        loss=init_device_mesh(device_type, (sizes.world_size,), mesh_dim_names=("loss",)),
    )
