"""Ring attention: queries stay, keys and values travel around the ranks that the sequence is split over.

Source: Ring Attention, arXiv 2310.01889; the merge of partial results is that of Flash Attention (arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from automodel_trainer.strategies.context.block_attention import attend, attend_backward, wide
from automodel_trainer.strategies.context.ring_blocks import ALL, blocks_of


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    group: Any,
    *,
    causal: bool = True,
    starts: list[list[int]] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """Exact attention over the shards of `group`, each rank holding chunks r and 2n−1−r of the sequence.

    Args:
        query: `[b, h, s/n, d]`.
        key, value: `[b, h_kv, s/n, d]`, with h a multiple of h_kv.
        mask: bool `[b, 1, s/n, s]`, True where a query may look, columns in rank-major order; None: `causal` says it.
        causal: without a mask, a token sees those before it; else it sees all.
        starts: without a mask, where the documents of every row begin, ascending from 0 (`blocks_of`).
        scaling: of the scores; None: 1/√d.

    Returns:
        `[b, s/n, h, d]`.

    Raises:
        ValueError: something that ring attention does not do.
    """
    for name, given in (("dropout", dropout), ("softcap", softcap), ("s_aux", s_aux), ("position_bias", position_bias)):
        if given is not None and (isinstance(given, Tensor) or given != 0):
            raise ValueError(f"Ring attention does not do {name} in attention. Set cp_attention='ulysses'.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _Ring.apply(query, key, value, mask, group, causal, scaling, starts)
    return out.transpose(1, 2).contiguous()


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        group: Any,
        causal: bool,
        scale: float,
        starts: list[list[int]] | None,
    ) -> Tensor:
        b, h, s, _ = query.shape
        out = torch.zeros(b, h, s, value.shape[-1], dtype=wide(query.dtype), device=query.device)
        lse = torch.full((b, h, s), float("-inf"), dtype=wide(query.dtype), device=query.device)
        k, v = key.contiguous(), value.contiguous()
        size = dist.get_world_size(group)
        ctx.random = None
        for step in range(size):
            arriving = _pass_on([k, v], group) if step < size - 1 else None
            for block in blocks_of(s, *_ranks(step, group), mask, causal, starts):
                mine, theirs = (block.rows, ALL, block.queries), (block.rows, ALL, block.keys)
                *part, random = attend(query[mine], k[theirs], v[theirs], block, scale)
                merge(out[mine], lse[mine], *part)
                ctx.random = random or ctx.random
            if arriving is not None:
                k, v = arriving()
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, result, lse)
        ctx.group, ctx.causal, ctx.scale, ctx.starts = group, causal, scale, starts
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse = ctx.saved_tensors
        grad, group = gradients[0], ctx.group
        k, v = key.contiguous(), value.contiguous()
        dq, dk, dv = (
            torch.zeros_like(t, dtype=wide(t.dtype), memory_format=torch.contiguous_format) for t in (query, k, v)
        )
        size = dist.get_world_size(group)
        for step in range(size):
            arriving = _pass_on([k, v], group) if step < size - 1 else None
            for block in blocks_of(query.shape[2], *_ranks(step, group), mask, ctx.causal, ctx.starts):
                mine, theirs = (block.rows, ALL, block.queries), (block.rows, ALL, block.keys)
                parts = attend_backward(
                    grad[mine], query[mine], k[theirs], v[theirs], out[mine], lse[mine], block, ctx.scale, ctx.random
                )
                dq[mine] += parts[0]
                dk[theirs] += parts[1]
                dv[theirs] += parts[2]
            if arriving is not None:
                k, v = arriving()
            dk, dv = _pass_on([dk, dv], group)()  # sums travel with their keys, and one hop more: home
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None, None, None, None


def _ranks(step: int, group: Any) -> tuple[int, int, int]:
    """This rank, the one whose keys are here at this step, and how many there are."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    return rank, (rank - step) % size, size


def _pass_on(tensors: list[Tensor], group: Any) -> Callable[[], list[Tensor]]:
    """Start sending to the next rank; the returned function waits for what the previous rank sent."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    received = [torch.empty_like(tensor) for tensor in tensors]
    after, before = (rank + 1) % size, (rank - 1) % size
    sends = [dist.P2POp(dist.isend, tensor, group=group, group_peer=after) for tensor in tensors]
    receives = [dist.P2POp(dist.irecv, tensor, group=group, group_peer=before) for tensor in received]
    works = dist.batch_isend_irecv([*sends, *receives])

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        return received

    return wait


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's result to the running one, in place: both are averages under the softmax of their own keys."""
    total = torch.logaddexp(lse, part_lse)
    seen = total.clamp(min=torch.finfo(total.dtype).min)  # a row that has seen no key yet: 0 · exp(−inf), not NaN
    out.mul_((lse - seen).exp().unsqueeze(-1)).add_(part * (part_lse - seen).exp().unsqueeze(-1))
    lse.copy_(total)
