"""The attention cases of `numerics.py`: kernels for single and for packed documents, and a ring in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.numerics_cases import Made, Setting

ALL = slice(None)


def shapes(setting: Setting) -> tuple[int, int, int, int, int]:
    """Rows, length (odd), query heads, key heads, and width of a head."""
    return (2, 141, 4, 2, 16) if setting.small else (2, 1155, 16, 4, 128)


def qkv(setting: Setting, length: int | None = None) -> list[Tensor]:
    rows, odd, heads, shared, width = shapes(setting)
    return [setting.randn(rows, h, length or odd, width) for h in (heads, shared, shared)]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Plain attention `[b, s, h, d]`; zeros for a query that attends to nothing."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def one_document(setting: Setting) -> Made:
    """The kernel that transformers' `sdpa` chooses (cuDNN on Hopper)."""
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
    """FlexAttention with our block mask. On a CPU, forward only, because there is no backward."""

    def make(setting: Setting) -> Made:
        from torch.nn.attention.flex_attention import flex_attention

        from automodel_trainer.models.kernels.attention import document_block_mask

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
    """All ranks of a ring in one process: `ring_attention` without communication."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Any]) -> Tensor:
        from automodel_trainer.strategies.context.block_attention import attend as attend_block
        from automodel_trainer.strategies.context.block_attention import wide
        from automodel_trainer.strategies.context.ring_attention import merge

        out, lse = torch.zeros_like(q, dtype=wide(q.dtype)), torch.full(q.shape[:3], -torch.inf, device=q.device)
        ctx.random = None
        for block in blocks:
            mine, theirs = (block.rows, ALL, block.queries), (block.rows, ALL, block.keys)
            *part, random = attend_block(q[mine], k[theirs], v[theirs], block, q.shape[-1] ** -0.5)
            merge(out[mine], lse[mine], *part)
            ctx.random = random or ctx.random
        ctx.save_for_backward(q, k, v, out.to(q.dtype), lse)
        ctx.blocks = blocks
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        from automodel_trainer.strategies.context.block_attention import attend_backward, wide

        q, k, v, out, lse = ctx.saved_tensors
        sums = [torch.zeros_like(t, dtype=wide(t.dtype)) for t in (q, k, v)]
        scale = q.shape[-1] ** -0.5
        for block in ctx.blocks:
            mine, theirs = (block.rows, ALL, block.queries), (block.rows, ALL, block.keys)
            known = (gradients[0][mine], q[mine], k[theirs], v[theirs], out[mine], lse[mine])
            for total, part, at in zip(sums, attend_backward(*known, block, scale, ctx.random), (mine, theirs, theirs)):
                total[at] += part
        return *(total.to(t.dtype) for total, t in zip(sums, (q, k, v))), None


def ring_blocks(length: int, mask: Tensor | None, starts: list[list[int]] | None, ranks: int) -> Iterator[Any]:
    """The blocks of every rank, with their positions in the concatenated tensors of all ranks."""
    from automodel_trainer.strategies.context.ring_blocks import blocks_of

    part = length // ranks
    for rank in range(ranks):
        own = None if mask is None else mask[:, :, rank * part : (rank + 1) * part]
        for origin in range(ranks):
            for block in blocks_of(part, rank, origin, ranks, own, True, starts):
                block.queries = shifted(block.queries, rank * part, part)
                block.keys = shifted(block.keys, origin * part, part)
                yield block


def shifted(part: slice, by: int, length: int) -> slice:
    start, stop, _ = part.indices(length)
    return slice(by + start, by + stop)


def ring(kind: Literal["one document", "packed", "masked"]) -> Callable[[Setting], Made]:
    """A ring of four ranks. Causal attention, also within documents, uses flash kernels where they fit.

    With a mask it uses plain matmuls, and some rows attend to nothing.
    """

    def make(setting: Setting) -> Made:
        ranks = 4
        length = 2 * ranks * (shapes(setting)[1] // (2 * ranks) | 1)  # the ranks' chunks have an odd length
        leaves = qkv(setting, length)
        wide = setting.wide(*leaves)
        chunks = torch.arange(length).chunk(2 * ranks)
        order = torch.cat([torch.cat([chunks[r], chunks[2 * ranks - 1 - r]]) for r in range(ranks)])
        seen = (order[:, None] >= order[None, :])[None, None]
        drawn = torch.rand(leaves[0].shape[0], 1, length, length, generator=setting.generator)
        mask = starts = None
        if kind == "masked":
            drawn[:, :, 5] = 1.0
            mask = seen = (seen & (drawn < 0.5)).to(setting.device)
        if kind == "packed":
            begins = drawn[:, 0, 0] < 8 / length
            begins[:, 0] = True
            starts = [row.nonzero().flatten().tolist() for row in begins]
            numbers = begins.cumsum(1)[:, order]
            seen = seen & (numbers[:, :, None] == numbers[:, None, :])[:, None]
        seen, blocks = seen.to(setting.device), list(ring_blocks(length, mask, starts, ranks))
        return Made(lambda: RingOfOne.apply(*leaves, blocks).transpose(1, 2), lambda: attend(*wide, seen), leaves, wide)

    return make
