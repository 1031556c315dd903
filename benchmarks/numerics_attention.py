"""Attention in `numerics.py`: kernels for one document a row and for packed rows, and a ring in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.numerics_cases import Made, Setting


def shapes(setting: Setting) -> tuple[int, int, int, int, int]:
    """rows, length (odd), heads, heads of keys, width of a head."""
    return (2, 141, 4, 2, 16) if setting.small else (2, 1155, 16, 4, 128)


def qkv(setting: Setting, length: int | None = None) -> list[Tensor]:
    rows, odd, heads, shared, width = shapes(setting)
    return [setting.randn(rows, h, length or odd, width) for h in (heads, shared, shared)]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Plainly, `[b, s, h, d]`; zeros for a query that sees nothing."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def one_document(setting: Setting) -> Made:
    """What transformers' `sdpa` picks (cuDNN on Hopper)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    leaves = qkv(setting)
    wide = setting.wide(*leaves)
    layer = nn.Module()
    layer.num_key_value_groups = leaves[0].shape[1] // leaves[1].shape[1]  # type: ignore[assignment]
    seen = causal(leaves[0].shape[2], setting.device)
    return Made(
        lambda: sdpa_attention_forward(layer, *leaves, None, is_causal=True)[0],
        lambda: attend(*wide, seen),
        leaves,
        wide,
    )


def packed(window: int | None) -> Callable[[Setting], Made]:
    """FlexAttention over our block mask; on a CPU, which has no backward of it, forward only."""

    def make(setting: Setting) -> Made:
        from torch.nn.attention.flex_attention import flex_attention

        from automodel_trainer.models.attention import document_block_mask

        leaves = qkv(setting)
        wide = setting.wide(*leaves)
        rows, length = leaves[0].shape[0], leaves[0].shape[2]
        starts = torch.rand(rows, length, generator=setting.generator) < 8 / length
        numbers = starts.cumsum(1).to(setting.device)
        mask = document_block_mask(numbers, window)
        place = torch.arange(length, device=setting.device)
        seen = (causal(length, setting.device) & (numbers[:, :, None] == numbers[:, None, :]))[:, None]
        if window is not None:
            seen = seen & (place[:, None] - place[None, :] < window)
        run = flex_attention if setting.small else torch.compile(flex_attention, dynamic=False)

        def ours() -> Tensor:
            return run(*leaves, block_mask=mask, enable_gqa=True).transpose(1, 2)  # type: ignore[union-attr, return-value]

        if setting.small:
            for tensor in leaves:
                tensor.requires_grad_(False)
            return Made(ours, lambda: attend(*wide, seen))
        return Made(ours, lambda: attend(*wide, seen), leaves, wide)

    return make


class RingOfOne(torch.autograd.Function):
    """All ranks of a ring in one process: what `ring_attention` computes, without its sending."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ranks: int) -> Tensor:
        from automodel_trainer.strategies.block_attention import attend as attend_block
        from automodel_trainer.strategies.block_attention import wide
        from automodel_trainer.strategies.ring_attention import merge

        out, lse = torch.zeros_like(q, dtype=wide(q.dtype)), torch.full(q.shape[:3], -torch.inf, device=q.device)
        random = None
        for block in ring_blocks(q.shape[2], mask, ranks):
            rows, keys = block.queries, block.keys
            *part, random = attend_block(q[:, :, rows], k[:, :, keys], v[:, :, keys], block, q.shape[-1] ** -0.5)
            merge(out[:, :, rows], lse[:, :, rows], *part)
        ctx.save_for_backward(q, k, v, out.to(q.dtype), lse)
        ctx.mask, ctx.ranks, ctx.random = mask, ranks, random
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        from automodel_trainer.strategies.block_attention import attend_backward, wide

        q, k, v, out, lse = ctx.saved_tensors
        sums = [torch.zeros_like(t, dtype=wide(t.dtype)) for t in (q, k, v)]
        for block in ring_blocks(q.shape[2], ctx.mask, ctx.ranks):
            rows, keys = block.queries, block.keys
            mine, theirs = (gradients[0][:, :, rows], q[:, :, rows]), (k[:, :, keys], v[:, :, keys])
            known = (out[:, :, rows], lse[:, :, rows])
            parts = attend_backward(*mine, *theirs, *known, block, q.shape[-1] ** -0.5, ctx.random)
            for total, part, at in zip(sums, parts, (rows, keys, keys)):
                total[:, :, at] += part
        return *(total.to(t.dtype) for total, t in zip(sums, (q, k, v))), None, None


def ring_blocks(length: int, mask: Tensor | None, ranks: int) -> Iterator[Any]:
    """Every rank's blocks, at their places in the tensors of all ranks one after the other."""
    from automodel_trainer.strategies.ring_attention import block_of

    part = length // ranks
    for rank in range(ranks):
        rows = slice(rank * part, (rank + 1) * part)
        for origin in range(ranks):
            block = block_of(part, rank, origin, None if mask is None else mask[:, :, rows], causal=True)
            if block is not None:
                block.queries = shifted(block.queries, rank * part, part)
                block.keys = shifted(block.keys, origin * part, part)
                yield block


def shifted(part: slice, by: int, length: int) -> slice:
    start, stop, _ = part.indices(length)
    return slice(by + start, by + stop)


def ring(masked: bool) -> Callable[[Setting], Made]:
    """Four ranks. Without a mask: flash kernels where they fit. With one: plain matmuls, some rows seeing nothing."""

    def make(setting: Setting) -> Made:
        ranks = 4
        length = 2 * ranks * (shapes(setting)[1] // (2 * ranks) | 1)  # the ranks' chunks have an odd length
        leaves = qkv(setting, length)
        wide = setting.wide(*leaves)
        chunks = torch.arange(length, device=setting.device).chunk(2 * ranks)
        order = torch.cat([torch.cat([chunks[r], chunks[2 * ranks - 1 - r]]) for r in range(ranks)])
        seen = order[:, None] >= order[None, :]
        mask = None
        if masked:
            drawn = torch.rand(leaves[0].shape[0], 1, length, length, generator=setting.generator) < 0.5
            drawn[:, :, 5] = False
            mask = seen = drawn.to(setting.device) & seen
        return Made(
            lambda: RingOfOne.apply(*leaves, mask, ranks).transpose(1, 2), lambda: attend(*wide, seen), leaves, wide
        )

    return make
