"""The floating-point tensors of a value, such as the arguments or the result of a block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from automodel_trainer.nn._torch import pytree


def float_tensors(value: Any) -> list[Tensor]:
    """Those among the leaves of a value."""
    return [leaf for leaf in pytree.tree_leaves(value) if is_float(leaf)]


def is_float(leaf: Any) -> bool:
    """Whether this is a tensor of floating-point numbers."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
