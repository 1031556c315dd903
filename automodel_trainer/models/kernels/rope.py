"""Rotary position embedding (arXiv 2104.09864) with a library's kernel.

A transformers model rotates queries and keys with `apply_rotary_pos_emb`, a function of the Python module that defines
the model. We replace this function, so all models of the same Python module in this process are affected. First we
check, with random numbers, that the function computes what the kernel computes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from automodel_trainer.nn.on_cpu import on_cpu

NAME = "apply_rotary_pos_emb"
RopeKernel = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rope_obstacle(model: PreTrainedModel) -> str | None:
    """Why the models of `model`'s modules cannot rotate with another kernel; None: they can."""
    homes = _homes(model)
    if not homes:
        return f"{type(model).__name__} has no function {NAME}(q, k, cos, sin)"
    for home in homes:
        if not _is_rotate_half(_original(home)):
            return f"{home.__name__}.{NAME} rotates in another way than by halves of a head"
    return None


def swap_rope(model: PreTrainedModel, kernel: RopeKernel, device: torch.device) -> list[str]:
    """Make the models of `model`'s modules rotate with `kernel` on this kind of device.

    Args:
        model: `rope_obstacle(model)` must be None.
        kernel: of q `[b, h, s, d]`, k `[b, h_kv, s, d]`, cos and sin `[b, s, d]`.

    Returns:
        names of the functions that were replaced.

    Raises:
        ValueError: `rope_obstacle` finds an obstacle.
    """
    if (obstacle := rope_obstacle(model)) is not None:
        raise ValueError(f"This kernel does not fit: {obstacle}.")
    homes = _homes(model)
    for home in homes:
        setattr(home, NAME, _exchanged(_original(home), kernel, device.type))
    return [f"{home.__name__}.{NAME}" for home in homes]


def restore_rope(model: PreTrainedModel) -> None:
    """Undo `swap_rope`."""
    for home in _homes(model):
        setattr(home, NAME, _original(home))


def rotate_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation that kernels compute, in plain torch; shapes as in `swap_rope`."""

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    return rotated(q), rotated(k)


def _homes(model: PreTrainedModel) -> list[ModuleType]:
    """The Python modules that define parts of `model` and have such a function."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    found = [sys.modules[name] for name in names if name in sys.modules]
    return [home for home in found if callable(getattr(home, NAME, None))]


def _original(home: ModuleType) -> Callable[..., Any]:
    function = getattr(home, NAME)
    return getattr(function, "original", function)  # type: ignore[no-any-return]


def _exchanged(original: Callable[..., Any], kernel: RopeKernel, kind: str) -> Callable[..., Any]:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, unsqueeze_dim: int = 1, **kwargs: Any
    ) -> Any:
        plain = not args and not kwargs and unsqueeze_dim == 1 and q.device.type == kind
        if plain and cos.ndim == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1]:
            return kernel(q, k, cos, sin)
        return original(q, k, cos, sin, *args, unsqueeze_dim=unsqueeze_dim, **kwargs)

    apply_rotary_pos_emb.original = original  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


@on_cpu
def _is_rotate_half(function: Callable[..., Any]) -> bool:
    parameters = list(inspect.signature(function).parameters)
    if parameters[:4] != ["q", "k", "cos", "sin"] or "unsqueeze_dim" not in parameters:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    angles = torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        found = function(q, k, cos, sin)
    except Exception:  # it wants other arguments, so it computes something else
        return False
    wanted = rotate_half(q, k, cos, sin)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted))
