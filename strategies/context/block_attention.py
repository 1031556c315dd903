"""Attention of some queries to one block of keys, with results that `ring_attention` can merge.

Blocks without a mask run on torch's flash kernels if these support them. All others use plain matmuls over some rows of
scores at a time; this code is also the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from automodel_trainer.strategies.context._flash import Random, flash_backward, flash_fits, flash_forward

_SCORES = 2**26  # how many elements of attention scores may exist at a time


@dataclass
class Block:
    """Which of a rank's queries attend to which keys of another rank's shard.

    Args:
        queries, keys: ranges of the two shards.
        mask: bool `[b, 1, queries, keys]`, True where a query attends; None: see `causal`.
        causal: without a mask, each query attends to the keys up to its own index; otherwise to all keys.
        rows: rows of the micro-batch.
    """

    queries: slice
    keys: slice
    mask: Tensor | None
    causal: bool = False
    rows: slice = field(default_factory=lambda: slice(None))


def attend(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor, Random | None]:
    """Attention over one block.

    Args:
        q: the block's queries, `[b, h, q, d]`.
        k, v: the block's keys and values, `[b, h_kv, k, d]`.
        block: its mask and `causal` apply.
        scale: factor on the scores.

    Returns:
        out `[b, h, q, d]`, the log-sum-exp `[b, h, q]` in fp32 or wider, and the `random` argument of
        `attend_backward`. A query that sees no key has zeros and −inf.
    """
    if block.mask is None and flash_fits(q, k, v):
        return flash_forward(q, k, v, block.causal, scale)
    outs, sums = [], []
    for rows in _tiles(q, k):
        scores = _scores(q[:, :, rows], k, block, rows, scale)
        lse = scores.logsumexp(-1)
        # The clamp makes a row without any key exp(−inf) = 0, not NaN.
        weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
        outs.append(_ungroup(weights @ widen(v).unsqueeze(2)))
        sums.append(lse.flatten(1, 2))
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2), None


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    scale: float,
    random: Random | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block's contribution to the gradients of `q`, `k` and `v`, in their shapes.

    Args:
        grad: gradient of `out`, `[b, h, q, d]`.
        q: `[b, h, q, d]`.
        k, v: `[b, h_kv, k, d]`.
        out, lse: the result of attention to *all* keys, `[b, h, q, d]` and `[b, h, q]`.
        block, scale: as in `attend`.
        random: from `attend`.
    """
    if block.mask is None and flash_fits(q, k, v):
        return flash_backward(grad, q, k, v, out, lse, block.causal, scale, random)
    heads = k.shape[1]
    key, value = widen(k).unsqueeze(2), widen(v).unsqueeze(2)
    dq = []
    dk, dv = torch.zeros_like(k, dtype=wide(k.dtype)), torch.zeros_like(v, dtype=wide(v.dtype))
    # FlashAttention-2's backward: recompute a tile's softmax from the log-sum-exps, then dS = P · (dP − delta).
    for rows in _tiles(q, k):
        g = _group(widen(grad[:, :, rows]), heads)
        delta = (g * _group(widen(out[:, :, rows]), heads)).sum(-1, keepdim=True)
        scores = _scores(q[:, :, rows], k, block, rows, scale)
        total = _group(lse[:, :, rows], heads).clamp(min=torch.finfo(lse.dtype).min)
        weights = (scores - total.unsqueeze(-1)).exp()
        ds = weights * (g @ value.mT - delta) * scale
        dv += (weights.mT @ g).sum(2)
        dk += (ds.mT @ _group(widen(q[:, :, rows]), heads)).sum(2)
        dq.append(_ungroup(ds @ key))
    return torch.cat(dq, dim=2), dk, dv


def _scores(q: Tensor, k: Tensor, block: Block, rows: slice, scale: float) -> Tensor:
    """Scores `[b, h_kv, h / h_kv, q, k]` in fp32 or wider, −inf where a query does not attend.

    `q` holds the `rows` of the block's queries.
    """
    scores = _group(widen(q), k.shape[1]) @ widen(k).unsqueeze(2).mT * scale
    if block.mask is not None:
        return scores.masked_fill(~block.mask[:, :, rows].unsqueeze(2), float("-inf"))
    if block.causal:
        query = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        return scores.masked_fill(query < torch.arange(k.shape[2], device=q.device), float("-inf"))
    return scores


def _tiles(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Ranges of queries whose scores fit in memory."""
    length = q.shape[2]
    size = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _group(tensor: Tensor, heads: int) -> Tensor:
    """`[b, h, …]` to `[b, heads, h / heads, …]`: group the query heads that share a key head."""
    return tensor.unflatten(1, (heads, -1))


def _ungroup(tensor: Tensor) -> Tensor:
    """`[b, heads, h / heads, …]` to `[b, h, …]`."""
    return tensor.flatten(1, 2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or `dtype` if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def widen(tensor: Tensor) -> Tensor:
    """`tensor` `[…]` in fp32 or wider."""
    return tensor.to(wide(tensor.dtype))
