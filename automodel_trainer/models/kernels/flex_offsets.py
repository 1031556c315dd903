"""Tensors that FlexAttention's kernels read from the right places, in rows of any number of tokens.

The kernels compute in 32 bits where a token of a listed block lies: its number times the distance between tokens in
memory (torch 2.11 to 2.13, `torch/_inductor/kernel/flex/templates`). The heads of a token lie side by side, so that
distance is 4,096 with 32 heads of 128, and beyond 524,288 tokens the product passes 2³¹: the kernel reads other memory.
Copies with one head after the other have tokens that are `d` apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_trainer.nn.operators import operator

LIMIT = 2**31  # elements


def passes_32_bits(*tensors: Tensor) -> bool:
    """Whether a token of one of `[b, h, s, d]` may lie so far from the first that 32 bits do not hold the distance."""
    return any(t.shape[2] * max(t.stride(2), t.shape[1] * t.shape[3]) > LIMIT for t in tensors)


@operator("head_by_head")
def head_by_head(tensor: Tensor) -> Tensor:
    """A copy of `[b, h, s, d]` that is contiguous. The compiler would choose the layout of a copy of its own."""
    return tensor.clone(memory_format=torch.contiguous_format)


@head_by_head.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


head_by_head.register_autograd(_backward)


class _GradientHeadByHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return head_by_head(gradient)  # type: ignore[no-any-return]


def with_gradient_head_by_head(out: Tensor) -> Tensor:
    """A result of attention `[b, h, s, d]`, whose gradient comes back contiguous."""
    return _GradientHeadByHead.apply(out)  # type: ignore[no-any-return, no-untyped-call]
