"""Blocks of attention, merged by their log-sum-exps, against attention to all keys at once in fp32 or wider."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from automodel_trainer.strategies.context import block_attention
from automodel_trainer.strategies.context.block_attention import Block, attend, attend_backward
from automodel_trainer.strategies.context.ring_attention import merge
from automodel_trainer.strategies.context.ring_blocks import blocks_of
from tests.harness import relative_error

SCALE = 0.3
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
ALL = slice(None)


def tensors(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query and gradient `[2, 4, 13, 8]`, key and value `[2, 2, 13, 8]` (heads shared by two)."""
    generator = torch.Generator().manual_seed(seed)
    q, grad, k, v = (torch.randn(2, heads, 13, 8, generator=generator).to(dtype) for heads in (4, 4, 2, 2))
    return q, grad, k, v


def reference(q: Tensor, grad: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> list[Tensor]:
    """Output and gradients by autograd, in fp32 or wider; zero where a query sees nothing."""
    leaves = [t.to(block_attention.wide(t.dtype)).requires_grad_() for t in (q, k, v)]
    key, value = (t.repeat_interleave(2, dim=1) for t in leaves[1:])
    scores = (leaves[0] @ key.mT * SCALE).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    out = weights @ value
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def in_blocks(q: Tensor, grad: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> list[Tensor]:
    wide = block_attention.wide(q.dtype)
    out = torch.zeros_like(q, dtype=wide)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide)
    kept = []
    for block in blocks:
        rows, keys = block.queries, block.keys
        *part, random = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], block, SCALE)
        merge(out[:, :, rows], lse[:, :, rows], *part)
        kept.append(random)
    result = out.to(q.dtype)
    sums = [torch.zeros_like(t, dtype=wide) for t in (q, k, v)]
    for block, random in zip(blocks, kept):
        rows, keys = block.queries, block.keys
        mine = (result[:, :, rows], lse[:, :, rows])
        parts = attend_backward(
            grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], *mine, block, SCALE, random
        )
        for total, part, at in zip(sums, parts, (rows, keys, keys)):
            total[:, :, at] += part
    return [result, *sums]


def zigzag() -> tuple[list[Block], Tensor]:
    """A shard's own keys causally, some keys that all of its queries see, and some that only the late ones do."""
    mask = torch.ones(13, 13, dtype=torch.bool).tril()[:, :5]
    seen = torch.zeros(13, 13, dtype=torch.bool)
    seen[:5, :5], seen[5:, :5] = mask[:5], True
    seen[:, 5:9], seen[6:, 9:] = True, True
    blocks = [Block(slice(0, 5), slice(0, 5), None, causal=True), Block(slice(5, 13), slice(0, 5), None)]
    return [*blocks, Block(ALL, slice(5, 9), None), Block(slice(6, 13), slice(9, 13), None)], seen


def masked(seed: int) -> tuple[list[Block], Tensor]:
    """Any mask, in two blocks; some queries see nothing of either, or of both."""
    seen = torch.rand(2, 1, 13, 13, generator=torch.Generator().manual_seed(seed)) < 0.4
    seen[:, :, 3] = False
    seen[0, :, 7, :6], seen[1, :, 8, 6:] = False, False
    return [Block(ALL, slice(0, 6), seen[..., :6]), Block(ALL, slice(6, 13), seen[..., 6:])], seen


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("kind", ["flash", "plain", "masked"])
def test_blocks_merge_to_the_whole(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(torch.randint(2**31, ()).item())
    print(f"seed {seed}")
    q, grad, k, v = tensors(dtype, seed)
    flash = block_attention.flash_forward
    calls: list[int] = []
    monkeypatch.setattr(block_attention, "flash_forward", lambda *args: calls.append(1) or flash(*args))
    monkeypatch.setattr(block_attention, "_SCORES", 2 * 4 * 13 * 5)  # several tiles
    if kind == "plain":
        monkeypatch.setattr(block_attention, "flash_fits", lambda *args: False)
    blocks, seen = masked(seed) if kind == "masked" else zigzag()
    got, want = in_blocks(q, grad, k, v, blocks), reference(q, grad, k, v, seen)
    assert bool(calls) == (kind == "flash")
    for name, value, expected in zip(("out", "dq", "dk", "dv"), got, want):
        assert relative_error(value.to(expected.dtype), expected) < LIMITS[dtype], name


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("half", [1, 2, 7])
def test_blocks_of_documents(ranks: int, half: int) -> None:
    """All blocks of all ranks together are what documents let see, and none says the same twice."""
    length = 2 * ranks * half
    chunks = torch.arange(length).chunk(2 * ranks)
    begins = torch.rand(5, length, generator=torch.Generator().manual_seed(half)) < 0.3
    begins[0], begins[1] = False, True  # one document, and every token its own
    begins[:, 0] = True
    starts = [row.nonzero().flatten().tolist() for row in begins]
    numbers = begins.cumsum(1)
    counted = torch.zeros(5, length, length, dtype=torch.int)
    for rank in range(ranks):
        for origin in range(ranks):
            mine, theirs = (torch.cat([chunks[r], chunks[2 * ranks - 1 - r]]) for r in (rank, origin))
            for block in blocks_of(2 * half, rank, origin, ranks, None, True, starts):
                queries, keys = mine[block.queries], theirs[block.keys]
                seen = queries[:, None] >= keys if block.causal else torch.ones(len(queries), len(keys))
                counted[block.rows.start, queries[:, None], keys] += seen.int()
    wanted = torch.ones(length, length).tril() * (numbers[:, :, None] == numbers[:, None, :])
    assert torch.equal(counted, wanted.int())


def test_heads_of_two_widths_are_plain() -> None:
    q, _, k, v = tensors(torch.float32, 0)
    assert block_attention.flash_fits(q, k, v)
    assert not block_attention.flash_fits(q, k, v[..., :6])
