"""Going on under another layout; all pairs are in docs/resume.md (`make test-matrix`), here every layout once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.resume import EXPERT_LAYOUTS, LAYOUTS, STEPS, checkpoint, difference, train
from tests.pool import RankPool

# Layouts, and the step that each trains to.
CHAINS = {
    "full": {"tp ×2": 2, "hsdp 2×2": 3, "pp ×2": 4, "fsdp2 ×4": 6, "single": STEPS},
    "experts": {"ep ×2": 2, "pp ×2, ep ×2": 3, "single": 4, "fsdp2 ×2, ep ×2": 6, "tp ×2, ep ×4": STEPS},
    "experts, LoRA": {"fsdp2 ×2, ep ×2": 2, "hsdp 2×2, ep ×2": 4, "fsdp2 ×2": 5, "tp ×2, ep ×4": STEPS},
    "LoRA": {"ddp ×2": 2, "fsdp2 ×2, tp ×2": 3, "pp ×2, tp ×2": 5, "fsdp2 ×2": 6, "cp ×2": STEPS},
}


def test_the_chains_pass_through_every_layout() -> None:
    assert {layout for chain in CHAINS.values() for layout in chain} == LAYOUTS.keys() | EXPERT_LAYOUTS.keys()


@pytest.mark.parametrize("kind", CHAINS)
def test_a_run_passed_on_from_layout_to_layout_is_one_run(pool: RankPool, tmp_path: Path, kind: str) -> None:
    """Curve, learning rate and the rows of every global batch, step by step, beyond the end of an epoch."""
    lora, experts = "LoRA" in kind, "experts" in kind
    whole = train(pool, tmp_path / "whole", "single", lora, experts=experts)
    seen = [row for step in whole["rows"][:5] for row in step if row[0]]  # fillers have no sample
    assert len(set(seen)) == len(seen), "no row twice in an epoch"
    before, done = None, 0
    for layout, last in CHAINS[kind].items():
        root = tmp_path / str(last)
        part = train(pool, root, layout, lora, before, every=last, last=last, experts=experts)
        assert [step for step, _, _ in part["steps"]] == list(range(done + 1, last + 1))
        difference(part, whole, same_layout=False)
        before, done = checkpoint(root, last), last
        if not lora:
            index, weights = index_and_weights(Path(before) / "model")
            assert index["weight_map"].keys() == weights.keys()
            assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())


def index_and_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    return json.loads((folder / "model.safetensors.index.json").read_text()), weights


@pytest.mark.parametrize("kind", ["workers", "stream"])
@pytest.mark.exact
def test_data_goes_on_row_by_row(pool: RankPool, tmp_path: Path, kind: str) -> None:
    """With batches that workers have built ahead, and in the middle of a stream: on the same ranks and on others."""
    whole = train(pool, tmp_path / "whole", "fsdp2 ×2", False, kind=kind)
    for layout in ("single", "fsdp2 ×2"):
        rest = train(pool, tmp_path / layout, layout, False, checkpoint(tmp_path / "whole"), kind=kind)
        assert len(rest["steps"]) == STEPS - 3
        difference(rest, whole, same_layout=layout == "fsdp2 ×2")
