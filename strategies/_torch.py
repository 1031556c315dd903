"""Every use of a private torch name in the strategies, and names that changed (torch 2.11-2.13)."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = ["StridedShard", "all_gather_single", "flatten_mesh", "reduce_scatter_single"]

# renamed in torch 2.13
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """A multi-dimensional mesh as one axis called `name`. Asked for twice, the same mesh comes back."""
    return mesh._flatten(name)
