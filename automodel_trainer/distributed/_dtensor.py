"""Every private torch name for meshes, DTensors and collectives (torch 2.11-2.13)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._redistribute import DTensorRedistributePlanner
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = [
    "StridedShard",
    "all_gather_first",
    "all_reduce_sum",
    "flatten_mesh",
    "local_tensor",
    "overlap_matmuls_with_collectives",
    "placeable",
    "redistributed",
    "reduce_scatter_first",
    "shard_offsets",
]


# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of `x` `[…]` over the ranks of `group`, as a new tensor `[…]`."""
    # In compiled code, call the functional ops, which are part of the compiled graph (here and below).
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.group_name))
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def all_gather_first(x: Tensor, group: ProcessGroup) -> Tensor:
    """Gather a contiguous `x` `[n, …]` from every rank along the first dimension: `[ranks · n, …]`."""
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.all_gather_into_tensor(x, group.size(), group.group_name))
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(whole, x, group=group)
    return whole


def reduce_scatter_first(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum a contiguous `x` `[ranks · n, …]` over the ranks and return this rank's part, `[n, …]`."""
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name))
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_scatter(part, x, group=group)
    return part


def _waited(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)  # type: ignore[no-any-return]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor of any shape, without autograd; a plain tensor is returned unchanged."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shard_offsets(tensor: DTensor) -> list[int]:
    """Offsets of this rank's shard in the whole tensor, one per dimension. The shard must be contiguous."""
    return list(tensor.__create_chunk_list__()[0].offsets)


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Flatten a multi-dimensional mesh into one axis called `name`. A second call returns the same mesh."""
    return mesh._flatten(name)


def placeable(tensor: DTensor) -> tuple[Placement, ...]:
    """The placements of `tensor`, with interleaved shards replaced by plain ones.

    A layer that fuses several matrices (such as gate and up) is sharded inside each of them. Such a shard is not one
    contiguous piece of the tensor, so a checkpoint cannot describe where it lies. FSDP2 also uses strided shards, for
    a dimension that tensor parallelism has sharded already. Those are contiguous and stay: their split factor is the
    number of shards along the mesh axes to their right.
    """
    placements = list(tensor.placements)
    for axis, placement in enumerate(placements):
        if isinstance(placement, StridedShard):
            inner = [
                i for i in range(axis + 1, len(placements)) if getattr(placements[i], "dim", None) == placement.dim
            ]
            if placement.split_factor != math.prod(tensor.device_mesh.size(i) for i in inner):
                placements[axis] = Shard(placement.dim)
    return tuple(placements)


def redistributed(tensor: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    """`tensor` sharded by `placements`. Collective. Interleaved shards are gathered first: they have no direct way."""
    gathered = tuple(
        Replicate() if now != wanted and StridedShard in (type(now), type(wanted)) else now
        for now, wanted in zip(tensor.placements, placements)
    )
    return tensor.redistribute(placements=gathered).redistribute(placements=placements)


def overlap_matmuls_with_collectives(group: ProcessGroup) -> None:
    """Let inductor fuse matmuls with the all-gathers and reduce-scatters of `group` next to them."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    torch._inductor.config._micro_pipeline_tp = True


def _plan_interleaved_shards_one_by_one() -> None:
    """Let torch 2.11 and 2.12 gather a shard that is interleaved, as torch 2.13 does.

    They take every strided shard for an order of mesh axes, and stop at one whose split factor is no product of axes,
    such as the halves of a fused gate and up. Torch 2.13 (torch/distributed/tensor/_redistribute.py) plans these one
    axis after the other.
    """
    planner: Any = DTensorRedistributePlanner
    plan = planner.generate_graph_based_transform_infos

    @functools.wraps(plan)
    def planned(self: Any, source: Any, target: Any, shape: tuple[int, ...]) -> Any:
        try:
            return plan(self, source, target, shape)
        except ValueError as error:
            if "unable to be interpreted" not in str(error):
                raise
            return self.generate_greedy_transform_infos(source, target)

    planner.generate_graph_based_transform_infos = planned


if torch.__version__ < (2, 13):  # type: ignore[operator]
    _plan_interleaved_shards_one_by_one()
