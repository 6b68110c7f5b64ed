"""Who computes what with whom: the sizes of each kind of parallelism and the device meshes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from veomni_parallel.errors import ParallelError


@dataclass(frozen=True)
class ParallelSizes:
    """Resolved sizes; dp_replicate x dp_shard x ulysses x tp is `world_size`, and `ep` lies across the last three."""

    world_size: int
    dp_replicate: int
    dp_shard: int
    ulysses: int
    tp: int = 1
    ep: int = 1

    @property
    def dp(self) -> int:
        """Number of ranks that read different samples: replicas x shards."""
        return self.dp_replicate * self.dp_shard

    @property
    def ep_fsdp(self) -> int:
        """Number of ranks that share each expert of one replica; 1 without expert parallelism."""
        return self.dp_shard * self.ulysses * self.tp // self.ep if self.ep > 1 else 1


def resolve_sizes(
    world_size: int,
    dp_replicate: int = 1,
    dp_shard: int = -1,
    ulysses: int = 1,
    *,
    cp: int = 1,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
) -> ParallelSizes:
    """The arithmetic of `init_parallel_state`, without processes, for planning.

    world_size = dp_replicate x dp_shard x ulysses x tp; at most one of the four is -1 and is derived from the others.
    Experts are dealt over groups of `ep` ranks inside one replica, so `ep` divides dp_shard x ulysses x tp.

    Raises:
        ParallelError: a size is neither positive nor -1, several are -1, the product is not `world_size`, `ep` does not
            divide a replica's ranks, or `cp` or `pp` is not 1.
    """
    for name, size, instead in (("cp", cp, "ulysses"), ("pp", pp, "dp_shard or tp")):
        if size != 1:
            kind = "Context" if name == "cp" else "Pipeline"
            raise ParallelError(f"{kind} parallelism is not built yet, so {name}={size} must be 1; use {instead}.")
    sizes = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "ulysses": ulysses, "tp": tp}
    given = f"world_size={world_size}, " + ", ".join(f"{name}={size}" for name, size in {**sizes, "ep": ep}.items())
    if world_size < 1 or ep < 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ParallelError(f"Parallel sizes are positive integers (or -1 to derive one, but not ep): {given}.")
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
            f"dp_replicate x dp_shard x ulysses x tp = {product} ranks, but there are {world_size}: {given}."
        )
    replica = world_size // sizes["dp_replicate"]
    if replica % ep:
        raise ParallelError(
            f"ep={ep} does not divide the {replica} ranks of one replica (dp_shard={sizes['dp_shard']} x"
            f" ulysses={sizes['ulysses']} x tp={sizes['tp']}): {given}."
        )
    return ParallelSizes(world_size, **sizes, ep=ep)


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

    All views are one-dimensional, of size 1 where unused, and answer `.size()`, `.get_local_rank()`, `.get_group()`;
    only `shard_mesh` and `expert_shard_mesh`, which are what `fully_shard` takes, have a second dimension if there are
    replicas.
    """

    sizes: ParallelSizes
    device_type: str
    rank: int
    dp: Mesh
    """Ranks that read different samples: replicate x shard."""
    replicate: Mesh
    """Ranks that hold copies of the same shards."""
    fsdp: Mesh
    """Ranks that share one copy of the parameters: shard x sp."""
    sp: Mesh
    """Ranks that share each row of tokens (Ulysses); neighbours, so that they lie in one node."""
    tp: Mesh
    """Ranks that share each matrix and hold the same tokens; the closest neighbours."""
    pp: Mesh
    """Ranks that share the depth of the model; of size 1."""
    ep: Mesh
    """Ranks that hold different experts and exchange tokens; neighbours inside one replica."""
    ep_fsdp: Mesh
    """Ranks of one replica that share the shards of the same experts: all of its ranks / ep."""
    loss: Mesh
    """Ranks that hold different tokens: dp x sp."""
    shard_mesh: Mesh
    """What dense parameters are sharded over: `fsdp`, or (replicate, fsdp) if there are replicas."""
    expert_shard_mesh: Mesh
    """What each rank's experts are sharded over: `ep_fsdp`, or (replicate, ep_fsdp) if there are replicas."""
    ep_outside: bool = False
    """Whether the ranks of an expert group lie far apart."""

    @property
    def device(self) -> torch.device:
        """This rank's device: the current one of `device_type`."""
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.device_type, torch.accelerator.current_device_index())

    def describe(self) -> str:
        """A drawing of the ranks.

        One line per data-parallel rank, its Ulysses ranks side by side, tensor-parallel ranks in brackets; and with
        expert parallelism one line per group of ranks that hold different experts.
        """
        s = self.sizes
        factors = [f"{s.dp_replicate} replicate", f"{s.dp_shard} shard", f"{s.ulysses} ulysses"]
        factors += [f"{s.tp} tp"] * (s.tp > 1)
        lines = [
            f"{s.world_size} rank{'s' * (s.world_size > 1)} on {self.device_type} = {' x '.join(factors)}"
            + (f", experts over {s.ep} ep x {s.ep_fsdp} ep_fsdp" if s.ep > 1 else "")
            + f"; this is rank {self.rank}"
        ]
        for dp in range(s.dp):
            first = dp * s.ulysses * s.tp
            groups = [self._draw(range(first + u * s.tp, first + (u + 1) * s.tp)) for u in range(s.ulysses)]
            row = " ".join(f"({group.strip()})" if s.tp > 1 else group for group in groups)
            lines.append(f"  replica {dp // s.dp_shard}  shard {dp % s.dp_shard}  ranks {row}".rstrip())
        groups_of_experts = _experts_of_replicas(s, self.ep_outside).reshape(-1, s.ep).tolist() if s.ep > 1 else []
        for group, ranks in enumerate(groups_of_experts):
            row = self._draw(ranks)
            lines.append(f"  replica {group // s.ep_fsdp}  ep_fsdp {group % s.ep_fsdp}  experts over {row}".rstrip())
        return "\n".join(lines)

    def _draw(self, ranks: Sequence[int]) -> str:
        width = len(str(self.sizes.world_size - 1))
        return " ".join(f"[{r:>{width}}]" if r == self.rank else f" {r:>{width}} " for r in ranks)


def init_parallel_state(
    dp_replicate: int = 1,
    dp_shard: int = -1,
    ulysses: int = 1,
    device_type: str | None = None,
    *,
    cp: int = 1,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    ep_outside: bool = False,
    node_size: int | None = None,
) -> ParallelState:
    """Build the meshes of this run. Call it on every rank after `torch.distributed.init_process_group`.

    Launchers number ranks node by node, and here tensor-parallel ranks are next to each other, then the ranks that
    share a row, then shards, and replicas lie furthest apart: what talks most stays inside a node. Expert groups are
    neighbours inside a replica. Without a process group the result is the state of one process.

    Args:
        dp_replicate: copies of the sharded model (HSDP).
        dp_shard: data-parallel ranks that share one copy of the parameters.
        ulysses: ranks that share each row; parameters are sharded over them too.
        device_type: "cpu", "cuda", ...; None: "cpu" under gloo, otherwise the accelerator that torch finds.
        cp: context parallel size; must be 1.
        tp: ranks that share each matrix.
        pp: pipeline parallel size; must be 1.
        ep: ranks that hold different experts; divides dp_shard x ulysses x tp.
        ep_outside: whether the ranks of an expert group lie far apart, with the shards of each expert close together.
        node_size: ranks on a node; if given, groups of tp x ulysses ranks that would cross nodes are refused.

    Raises:
        ParallelError: the sizes do not fit the number of ranks or the nodes.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if device_type is None:
        on_accelerator = torch.accelerator.is_available() and not (distributed and dist.get_backend() == "gloo")
        device_type = torch.accelerator.current_accelerator().type if on_accelerator else "cpu"
    world_size = dist.get_world_size() if distributed else 1
    sizes = resolve_sizes(world_size, dp_replicate, dp_shard, ulysses, cp=cp, tp=tp, pp=pp, ep=ep)
    if node_size is not None and (node_size < 1 or node_size % (sizes.tp * sizes.ulysses)):
        raise ParallelError(
            f"Groups of tp={sizes.tp} x ulysses={sizes.ulysses} ranks do not fit into nodes of node_size={node_size}"
            " ranks without crossing them: choose sizes whose product divides it, or leave node_size out."
        )
    if ep_outside and sizes.tp > 1:
        raise ParallelError(
            f"ep_outside puts tp={sizes.tp} ranks, which hold the same tokens, into one group of shards of experts: use"
            " ep_outside=False, or tp=1."
        )
    if not distributed:
        alone = LocalMesh(device_type)
        meshes = (
            "dp",
            "replicate",
            "fsdp",
            "sp",
            "tp",
            "pp",
            "ep",
            "ep_fsdp",
            "loss",
            "shard_mesh",
            "expert_shard_mesh",
        )
        same: dict[str, Any] = dict.fromkeys(meshes, alone)
        return ParallelState(sizes, device_type, rank=0, **same)

    views = _Views(device_type, world_size)
    r, s, u, t, e = sizes.dp_replicate, sizes.dp_shard, sizes.ulysses, sizes.tp, sizes.ep
    ranks = torch.arange(world_size).view(r, s, u, t)
    # FSDP takes the views of a parameter that is divided twice from one mesh
    dense = views.mesh({"replicate": r, "fsdp": s * u, "tp": t}, keep="fsdp")
    in_replica = _experts_of_replicas(sizes, ep_outside)
    experts = None
    if e > 1:
        experts = views.mesh({"replicate": r, "ep_fsdp": sizes.ep_fsdp, "ep": e}, keep="ep_fsdp", grid=in_replica)
    one = views.of("one", in_replica, ())
    return ParallelState(
        sizes,
        device_type,
        rank=dist.get_rank(),
        dp=views.of("dp", ranks, (0, 1)),
        replicate=views.of("replicate", ranks, (0,)),
        fsdp=views.of("fsdp", ranks, (1, 2)),
        sp=views.of("sp", ranks, (2,)),
        tp=views.of("tp", ranks, (3,)),
        pp=one,
        ep=views.of("ep", in_replica, (2,)),
        ep_fsdp=views.of("ep_fsdp", in_replica, (1,)) if experts is not None else one,
        loss=views.of("loss", ranks, (0, 1, 2)),
        shard_mesh=dense["replicate", "fsdp"] if r > 1 else views.of("fsdp", ranks, (1, 2)),
        ep_outside=ep_outside,
        expert_shard_mesh=one
        if experts is None
        else experts["replicate", "ep_fsdp"]
        if r > 1
        else views.of("ep_fsdp", in_replica, (1,)),
    )


def _experts_of_replicas(sizes: ParallelSizes, ep_outside: bool) -> torch.Tensor:
    """[replicate, ep_fsdp, ep]: the ranks, each row of which holds all experts."""
    shape = (sizes.dp_replicate, sizes.ep, -1) if ep_outside else (sizes.dp_replicate, -1, sizes.ep)
    ranks = torch.arange(sizes.world_size).view(*shape)
    return ranks.transpose(1, 2).contiguous() if ep_outside else ranks


class _Views:
    """One-dimensional meshes, each made once: ranks that are together under two names share a process group."""

    def __init__(self, device_type: str, world_size: int) -> None:
        self.device_type, self.world_size = device_type, world_size
        self.known: dict[tuple[tuple[int, ...], ...], Any] = {}

    def mesh(self, dims: dict[str, int], keep: str, grid: torch.Tensor | None = None) -> Any:
        """A mesh of all ranks, of those dimensions that are larger than one and of `keep`, whose views become known.

        `grid` holds the ranks in these dimensions; None: in their order.
        """
        dims = {name: size for name, size in dims.items() if size > 1 or name == keep}
        grid = (torch.arange(self.world_size) if grid is None else grid).reshape(*dims.values())
        mesh: Any = DeviceMesh(self.device_type, grid, mesh_dim_names=tuple(dims))
        for axis, name in enumerate(dims):
            self.known[_together(grid, (axis,))] = mesh[name] if len(dims) > 1 else mesh
        return mesh

    def of(self, name: str, grid: torch.Tensor, axes: tuple[int, ...]) -> Any:
        """The mesh of the ranks that differ only along `axes` of `grid`; a collective if it is new."""
        together = _together(grid, axes)
        if together not in self.known:
            group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in together])
            self.known[together] = DeviceMesh.from_group(group, self.device_type, mesh_dim_names=(name,))
        return self.known[together]


def _together(grid: torch.Tensor, axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    rest = [axis for axis in range(grid.ndim) if axis not in axes]
    size = 1
    for axis in axes:
        size *= grid.shape[axis]
    return tuple(tuple(ranks) for ranks in grid.permute(*rest, *axes).reshape(-1, size).tolist())
