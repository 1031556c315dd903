"""Every use of a private torch name in the strategies, and names that changed (torch 2.11-2.13)."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = ["StridedShard", "all_gather_single", "flatten_mesh", "placeable", "reduce_scatter_single"]

# renamed in torch 2.13
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
