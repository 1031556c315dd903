"""Every private torch name for meshes, DTensors and collectives (torch 2.11-2.13)."""

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
    "local_tensor",
    "overlap_matmuls_with_collectives",
    "placeable",
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


def overlap_matmuls_with_collectives(group: ProcessGroup) -> None:
    """Let inductor fuse matmuls with the all-gathers and reduce-scatters of `group` next to them."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    torch._inductor.config._micro_pipeline_tp = True
