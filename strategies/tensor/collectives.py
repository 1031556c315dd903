"""Collectives with the gradients that tensor parallel needs.

Between cut layers, every rank of a group has the same activations and computes the same gradients of them: these
gradients are "full". Inside a cut layer a rank computes only its own part's contribution: such a gradient is "partial",
and the full one is the sum over ranks. Each function here states which kind it takes and returns. Activations are
`[b, s, h]`.

Source: Megatron-LM, arXiv 1909.08053 (f and g), and with sequence shards arXiv 2205.05198 (g and its conjugate).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from automodel_trainer.distributed._dtensor import all_gather_first, all_reduce_sum, reduce_scatter_first

SEQUENCE = 1  # the sequence dimension of [b, s, h]


def sum_gradient(x: Tensor, group: ProcessGroup, wide: bool = False) -> Tensor:
    """Return `x` `[…]`; in backward, sum its partial gradients over ranks. Used at the entry of a column-cut layer.

    Args:
        wide: sum in fp32 or wider.
    """
    return _SumGradient.apply(x, group, wide) if x.requires_grad and torch.is_grad_enabled() else x


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum the ranks' `x` `[…]`; the full gradient passes unchanged. Used at the exit of a row-cut layer."""
    return _AllReduce.apply(x, group)


def slice_features(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's chunk of the last dimension of `x` `[…, h]`; in backward, the ranks' chunks are gathered."""
    return _Slice.apply(x, group, -1)


def gather_features(x: Tensor, group: ProcessGroup, width: int) -> Tensor:
    """Gather the ranks' chunks of the last dimension, as `torch.chunk` makes them, into `[…, width]`.

    The gradient is full; this rank takes its chunk of it.
    """
    return _Gather.apply(x, group, -1, width)


def slice_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's chunk of the first dimension of `x` `[n, …]`; in backward, the ranks' chunks are gathered."""
    return _Slice.apply(x, group, 0)


def gather_rows(x: Tensor, group: ProcessGroup, count: int) -> Tensor:
    """Gather the ranks' chunks of the first dimension, as `torch.chunk` makes them, into `[count, …]`.

    The gradient is full; this rank takes its chunk of it.
    """
    return _Gather.apply(x, group, 0, count)


def slice_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's `[b, ceil(s / ranks), h]` of `x` `[b, s, h]`, padded with zeros; in backward, parts are gathered."""
    return _SliceSequence.apply(x, group)


def gather_sequence(x: Tensor, group: ProcessGroup, length: int, partial: bool = False) -> Tensor:
    """Gather the ranks' `[b, ceil(length / ranks), h]` into `[b, length, h]`.

    Args:
        partial: the gradient is partial and is reduce-scattered; otherwise it is full and this rank takes its slice.
    """
    return _GatherSequence.apply(x, group, length, partial)


def reduce_scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's `[b, ceil(s / ranks), h]` of the sum of the ranks' `[b, s, h]`; in backward, parts are gathered."""
    return _ReduceScatterSequence.apply(x, group)


class _SumGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, wide: bool) -> Tensor:
        ctx.group, ctx.wide = group, wide
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dtype = torch.promote_types(grad.dtype, torch.float32) if ctx.wide else grad.dtype
        return all_reduce_sum(grad.to(dtype), ctx.group).to(grad.dtype), None, None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Slice(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.width = group, dim, x.shape[dim]
        return _chunk(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _gathered(grad, ctx.group, ctx.dim, ctx.width), None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, width: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _chunk(grad, ctx.group, ctx.dim), None, None, None


class _SliceSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, x.shape[SEQUENCE]
        return _padded_chunk(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _gathered(grad, ctx.group, SEQUENCE, ctx.length), None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, length: int, partial: bool) -> Tensor:
        ctx.group, ctx.partial = group, partial
        return _gathered(x, group, SEQUENCE, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        part = _reduce_scattered(grad, ctx.group) if ctx.partial else _padded_chunk(grad, ctx.group)
        return part, None, None, None


class _ReduceScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, x.shape[SEQUENCE]
        return _reduce_scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _gathered(grad, ctx.group, SEQUENCE, ctx.length), None


def _chunk(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's chunk along `dim`, as `torch.chunk` makes it: the last ones may be shorter or empty."""
    size, width = group.size(), x.shape[dim]
    step = -(-width // size)
    start = min(group.rank() * step, width)
    return _copy(x.narrow(dim, start, min(step, width - start)))


def _copy(view: Tensor) -> Tensor:
    """A contiguous copy, even if the view is contiguous already.

    torch 2.11's compiler silently drops the gradient of a view that an autograd.Function returns.
    """
    return view.clone(memory_format=torch.contiguous_format)


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    """Pad `x` with zeros at the end of `dim`, to `length`."""
    missing = length - x.shape[dim]
    # F.pad takes a pair of (before, after) for each dimension, the last dimension first.
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, missing]) if missing else x


def _padded_chunk(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's chunk `[b, ceil(s / ranks), h]` of the sequence, padded with zeros."""
    step = -(-x.shape[SEQUENCE] // group.size())
    return _pad(_chunk(x, group, SEQUENCE), SEQUENCE, step)


def _gathered(x: Tensor, group: ProcessGroup, dim: int, length: int) -> Tensor:
    """Concatenate the ranks' chunks along `dim` and cut off the padding, to `length`."""
    size = group.size()
    x = _pad(x, dim, -(-length // size)).contiguous()  # the collective needs equal sizes
    # The collective stacks along dimension 0: split there, and join along `dim`.
    whole = torch.cat(all_gather_first(x, group).chunk(size), dim)
    return whole if whole.shape[dim] == length else _copy(whole.narrow(dim, 0, length))


def _reduce_scattered(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's `[b, ceil(s / ranks), h]` of the sum of the ranks' `[b, s, h]`."""
    size = group.size()
    x = _pad(x, SEQUENCE, -(-x.shape[SEQUENCE] // size) * size)
    return reduce_scatter_first(torch.cat(x.chunk(size, SEQUENCE)), group)
