"""Ring attention: queries stay, while keys and values are passed around the ranks that a sequence is split over.

Sources: Ring Attention, arXiv 2310.01889; partial results are merged as in FlashAttention, arXiv 2205.14135.
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
    """Exact attention over n shards. Rank r holds chunks r and 2n−1−r of the sequence. Collective.

    Args:
        query: `[b, h, s/n, d]`.
        key, value: `[b, h_kv, s/n, d]`, with h a multiple of h_kv.
        mask: bool `[b, 1, s/n, s]`, True where a query attends, columns in rank-major order; None: see `causal`.
        group: the ranks that hold the shards.
        causal: without a mask, a token attends to itself and earlier tokens; otherwise to all.
        starts: without a mask, the start indices of the documents of every row, ascending from 0 (see `blocks_of`).
        scaling: factor on the scores; None: 1/√d.
        dropout, softcap, s_aux, position_bias: not supported; must be None or 0.

    Returns:
        `[b, s/n, h, d]`.

    Raises:
        ValueError: the model asks for something that ring attention does not support.
    """
    for name, given in (("dropout", dropout), ("softcap", softcap), ("s_aux", s_aux), ("position_bias", position_bias)):
        if given is not None and (isinstance(given, Tensor) or given != 0):
            raise ValueError(
                f"cp_attention='ring' does not support {name}, which this model's attention uses. Set "
                "cp_attention='ulysses'."
            )
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
        ctx.random = None  # without dropout, the state of any block serves the backward of all
        for step in range(size):
            # Start the transfer of the next keys and values, then compute with the current ones.
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
            # Gradients move along with their keys. After the last step one more hop brings them home.
            dk, dv = _pass_on([dk, dv], group)()
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None, None, None, None


def _ranks(step: int, group: Any) -> tuple[int, int, int]:
    """This rank, the rank whose keys are here at this step, and the number of ranks."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    return rank, (rank - step) % size, size


def _pass_on(tensors: list[Tensor], group: Any) -> Callable[[], list[Tensor]]:
    """Start sending tensors to the next rank. The returned function waits for those of the previous rank."""
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
    """Merge a block's result into the running one, in place.

    Each `out` is an average weighted by the softmax over its own keys. The log-sum-exps say how much weight each has.

    Args:
        out, lse: the running result, `[b, h, q, d]` and `[b, h, q]`; `lse` starts at −inf.
        part, part_lse: the block's result, in the same shapes.
    """
    total = torch.logaddexp(lse, part_lse)
    seen = total.clamp(min=torch.finfo(total.dtype).min)  # a row that has seen no key gets exp(−inf) = 0, not NaN
    out.mul_((lse - seen).exp().unsqueeze(-1)).add_(part * (part_lse - seen).exp().unsqueeze(-1))
    lse.copy_(total)
