"""Every use of a private torch name in the strategies (torch 2.11-2.13)."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """A multi-dimensional mesh as one axis called `name`. Asked for twice, the same mesh comes back."""
    return mesh._flatten(name)
