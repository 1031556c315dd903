"""All-to-all attention: sequence shards become head shards, so each rank attends over whole sequences of some heads.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """Send slice i of dimension 0 to rank i, and receive rank i's slice there. Its backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, tensor.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradients[0], ctx.group), None


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Callable[..., Tensor],
    group: Any,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over n shards. Rank r holds chunks r and 2n−1−r of the sequence. Collective.

    Args:
        query: `[b, h, s/n, d]`, with h divisible by n.
        key, value: `[b, h_kv, s/n, d]`; heads are repeated if n does not divide h_kv.
        attend: attention over whole sequences in natural order: `[b, h', s, d]` each, to `[b, s, h', d]`.
        group: the ranks that hold the shards.
        sinks: `[h]`, attention sinks of the query heads.

    Returns:
        `[b, s/n, h, d]`.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    repeats = size // math.gcd(size, key.shape[1])  # the fewest copies that make n divide the key heads
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    whole = [_heads_for_sequence(tensor, size, group) for tensor in (query, key, value)]
    extra = {} if sinks is None else {"s_aux": sinks.chunk(size)[rank]}
    return _sequence_for_heads(attend(*whole, **extra), size, group)


def stacked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Callable[..., Tensor],
    order: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    """What `ulysses_attention` computes, in a process that holds all n shards, one after another along the batch.

    Args:
        query, key, value: `[n·b, h, s/n, d]`.
        attend, sinks: see `ulysses_attention`.
        order: int64 `[s]`, the place in its row of every token of the shards.

    Returns:
        `[n·b, s/n, h, d]`.
    """
    shards = order.numel() // query.shape[2]
    whole = [torch.cat(t.chunk(shards), dim=2)[:, :, order.argsort()] for t in (query, key, value)]
    extra = {} if sinks is None else {"s_aux": sinks}
    return torch.cat(attend(*whole, **extra)[:, order].chunk(shards, dim=1))


def _heads_for_sequence(tensor: Tensor, size: int, group: Any) -> Tensor:
    """`[b, h, s/n, d]` to `[b, h/n, s, d]` in natural order."""
    b, h, s, d = tensor.shape
    parts = _AllToAll.apply(tensor.view(b, size, h // size, s, d).transpose(0, 1), group)
    # Each rank sent chunks r and 2n−1−r: first halves are in order, second halves in reverse.
    halves = parts.view(size, b, h // size, 2, s // 2, d)
    chunks = torch.cat([halves[:, :, :, 0], halves[:, :, :, 1].flip(0)])  # [2n, b, h/n, s/2n, d]
    return chunks.permute(1, 2, 0, 3, 4).reshape(b, h // size, size * s, d)


def _sequence_for_heads(tensor: Tensor, size: int, group: Any) -> Tensor:
    """`[b, s, h/n, d]` in natural order to `[b, s/n, h, d]`."""
    b, s, h, d = tensor.shape
    chunks = tensor.reshape(b, 2 * size, s // (2 * size), h, d).permute(1, 0, 2, 3, 4)
    parts = torch.cat([chunks[:size], chunks[size:].flip(0)], dim=2)  # [n, b, s/n, h/n, d]
    return _AllToAll.apply(parts, group).permute(1, 2, 0, 3, 4).reshape(b, s // size, size * h, d).contiguous()
