"""Going on under another layout; all pairs are in docs/resume.md (`make test-matrix`), here a ring through all."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.checkpoint.resume import LAYOUTS, STEPS, checkpoint, difference, train
from tests.pool import RankPool

RING = ["single", "ddp ×2", "fsdp2 ×4", "tp ×2", "hsdp 2×2", "cp ×2", "fsdp2 ×2, tp ×2", "fsdp2 ×2", "single"]


def test_each_layout_goes_on_from_another(pool: RankPool, tmp_path: Path) -> None:
    """Curve, learning rate and the rows of every global batch; full and LoRA in turn."""
    assert set(RING) == LAYOUTS.keys()
    for number, (first, second) in enumerate(pairwise(RING)):
        lora, root = bool(number % 2), tmp_path / str(number)
        whole = train(pool, root, first, lora)
        seen = [row for step in whole["rows"][:5] for row in step if row[0]]  # fillers have no sample
        assert len(set(seen)) == len(seen), "no row twice in an epoch"
        rest = train(pool, tmp_path / f"{number}-rest", second, lora, checkpoint(root))
        assert len(rest["steps"]) == STEPS - 3
        difference(rest, whole, same_layout=False)


@pytest.mark.parametrize("kind", ["workers", "stream"])
def test_data_goes_on_row_by_row(pool: RankPool, tmp_path: Path, kind: str) -> None:
    """With batches that workers have built ahead, and in the middle of a stream: on other ranks, then on the same."""
    whole = train(pool, tmp_path / "whole", "fsdp2 ×2", False, kind=kind)
    for layout in ("single", "fsdp2 ×2"):
        rest = train(pool, tmp_path / layout, layout, False, checkpoint(tmp_path / "whole"), kind=kind)
        difference(rest, whole, same_layout=layout == "fsdp2 ×2")
