"""The page about many GPUs: its tables are those of its script, and its rates those that were measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import scale  # noqa: E402


def test_tables_are_what_the_script_prints() -> None:
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.filled(page) == page, "`python docs/scale.py` writes them again"


def test_rates_were_measured() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for figure in ("10,019", "69,412", "17.98 GB", "39.9", "| `all_to_all` (NCCL) | 0.93 ms | 0.52 ms |"):
        assert figure in results
    for rate, text in ((scale.DENSE, 1e12), (scale.MIXTURE, 1e12), (scale.NVLINK, 1e9)):
        assert f"{rate / text:.0f}" in scale.PAGE.read_text(encoding="utf-8")


def test_sizes_of_layouts_by_hand() -> None:
    eight = scale.SHAPES["8B"]
    fsdp, hsdp = scale.LAYOUTS["8B"]
    per_gpu = 16 * eight.parameters / 8 / scale.GIB  # fp32 weights, gradients and two moments
    assert per_gpu < scale.memory(eight, hsdp, 1024) == scale.memory(eight, fsdp, 8) < per_gpu + 11  # what is gathered
    rings = 8 * eight.layers * eight.block * 7 / 8 / 258e9 + 3 * eight.layers * 7 * 5e-6  # bytes, and hops
    assert scale.communication(eight, fsdp, 8) == pytest.approx(rings, rel=0.01)
    assert scale.communication(eight, fsdp, 1024) > scale.communication(eight, hsdp, 1024)
    assert scale.SHAPES["671B"].parameters == pytest.approx(671e9, rel=0.01)
    assert scale.SHAPES["70B"].parameters == pytest.approx(70.6e9, rel=0.01)
