"""Every use of torch's private pytree module (torch 2.11-2.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Size, Tensor
from torch.utils._pytree import tree_map

__all__ = ["map_tensors"]


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any, shape: Size | tuple[int, ...]) -> Any:
    """Apply `change` to all tensors of this `shape`, such as `[b, s]`, in a nesting of lists, tuples and dicts.

    Everything else is returned unchanged.
    """
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.shape == shape else leaf, tree)
