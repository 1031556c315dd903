"""Dropout without a stored mask: the mask is a hash of a seed and the position, so backward computes it again.

A stored mask takes a byte for every element of every adapted layer's input: 10 GB for an 8B model at 8,192 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


def dropout(x: Tensor, p: float) -> Tensor:
    """x of any shape, with zeros with probability `p`, and the rest times 1 / (1 − p).

    Draws two numbers from torch's generator. A DTensor goes to torch's own dropout, which agrees over ranks.
    """
    if isinstance(x, DTensor):
        return F.dropout(x, p)
    seeds = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=x.device)
    out: Tensor = _Dropout.apply(x, seeds, p)
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seeds)
        ctx.p = p
        return _drop(x, seeds, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (seeds,) = ctx.saved_tensors
        return _drop(gradient, seeds, ctx.p), None, None


def _drop(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    return torch.where(_kept(x, seeds, p), x * (1 / (1 - p)), 0)


def _kept(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """The mask, bool in the shape of x: a hash of the index in the last dimension and the index over all others."""
    columns = x.shape[-1]
    row = torch.arange(x.numel() // max(columns, 1), dtype=torch.int32, device=x.device)
    column = torch.arange(columns, dtype=torch.int32, device=x.device)
    bits = _mixed(_mixed(row ^ seeds[0])[:, None] ^ _mixed(column ^ seeds[1]))
    return ((bits & 0x7FFFFFFF) >= round(p * 2**31)).view(x.shape)


def _mixed(h: Tensor) -> Tensor:
    """Hash int32. Source: Wellons, hash-prospector (16 21f0aaad 15 d35a2d97 15)."""
    h = (h ^ _shifted(h, 16)) * 0x21F0AAAD
    h = (h ^ _shifted(h, 15)) * (0xD35A2D97 - 2**32)
    return h ^ _shifted(h, 15)


def _shifted(h: Tensor, by: int) -> Tensor:
    """A logical shift to the right (`>>` is arithmetic)."""
    return (h >> by) & ((1 << (32 - by)) - 1)
