"""Dropout without a mask: its statistics, its gradient, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from automodel_trainer.models.lora.dropout import dropout
from tests.harness import close

ROWS, COLUMNS = 512, 384


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_every_place_is_dropped_as_often_and_on_its_own(p: float) -> None:
    torch.manual_seed(0)
    kept = dropout(torch.ones(2, ROWS // 2, COLUMNS), p).view(ROWS, COLUMNS)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    away = (kept != 0).float() - (1 - p)
    deviation = math.sqrt(p * (1 - p))

    def in_deviations(sums: Tensor, count: int) -> Tensor:
        return sums / (deviation * math.sqrt(count))

    assert abs(in_deviations(away.sum(), away.numel())) < 4
    for dim, count in ((0, ROWS), (1, COLUMNS)):
        assert in_deviations(away.sum(dim), count).square().mean() == pytest.approx(1, abs=0.3)
        for apart in (1, 2, 3, 64):
            pairs = (away.roll(apart, dim) * away).sum() / deviation
            assert abs(in_deviations(pairs, away.numel())) < 4.5


def test_the_gradient_goes_where_the_number_went() -> None:
    x = torch.randn(3, 8, 5, requires_grad=True)
    out = dropout(x, 0.3)
    out.backward(torch.full_like(out, 2.0))
    close(out.detach() * 2, x.detach() * x.grad)


def test_a_seed_says_it_all() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first.T, first)


def kept_bytes(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Of what autograd keeps: all, and masks."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run().sum().backward()
    return sum(t.nbytes for t in kept), sum(t.nbytes for t in kept if t.dtype == torch.bool)


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_no_mask_is_kept(backend: str | None) -> None:
    """As torch's own is, by which one sees that this would be noticed."""
    x, weight = torch.randn(256, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)

    def run(drop: Callable[[Tensor, float], Tensor]) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            return F.linear(drop(x, 0.3), weight)

        return forward if backend is None else torch.compile(forward, backend=backend)

    (torch_s, _), (ours, masks) = kept_bytes(run(F.dropout)), kept_bytes(run(dropout))
    assert masks == 0
    assert torch_s - ours >= x.numel() - 1024  # a byte a number; a few go into rows and columns


def test_eager_keeps_the_seeds_alone() -> None:
    x = torch.randn(256, 256, requires_grad=True)
    assert kept_bytes(lambda: dropout(x, 0.3)) == (8, 0)
