"""Every private torch name about meshes, DTensors and collectives (torch 2.11-2.13)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = [
    "StridedShard",
    "all_gather_first",
    "all_reduce_sum",
    "flatten_mesh",
    "overlap_matmuls_with_collectives",
    "placeable",
    "reduce_scatter_first",
]


# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' `x`, a new tensor."""
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.group_name))
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def all_gather_first(x: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' contiguous `[n, …]`, one after the other: `[ranks · n, …]`."""
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.all_gather_into_tensor(x, group.size(), group.group_name))
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(whole, x, group=group)
    return whole


def reduce_scatter_first(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's `[n, …]` of the sum of the ranks' contiguous `[ranks · n, …]`."""
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name))
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_scatter(part, x, group=group)
    return part


def _waited(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)  # type: ignore[no-any-return]


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """A multi-dimensional mesh as one axis called `name`. Asked for twice, the same mesh comes back."""
    return mesh._flatten(name)


def placeable(tensor: DTensor) -> tuple[Placement, ...]:
    """The placements of `tensor` with every packed cut (a part of each of its halves) made a plain one.

    A packed shard is not one piece of the tensor, so that a checkpoint cannot say where it lies. What FSDP2 makes of a
    dimension that is cut already is: its split factor counts the cuts to its right.
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


def overlap_matmuls_with_collectives(group: ProcessGroup) -> None:
    """Let inductor fuse matmuls with the gathers and scatters of `group` that they meet."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    torch._inductor.config._micro_pipeline_tp = True
