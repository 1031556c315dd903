"""`amt verify` of vision-language models sees pictures, and finds layouts that mix them up."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from automodel_trainer import ImageTextDataModule, ImageTextModule
from automodel_trainer.strategies.context import at_decoder
from automodel_trainer.verification.report import Report
from automodel_trainer.verification.verify import verify
from tests.matrix import more
from tests.pool import RankPool
from tests.tools.test_verify import Planted
from tests.vlm.families import model_of, processor_of
from tests.vlm.test_ranks import written


def report(
    pool: RankPool, root: Path, family: str, spec: str, defect: Callable[[pytest.MonkeyPatch], None] | None = None
) -> Report:
    written(root)
    module = ImageTextModule(model_of(family), processor=processor_of(family))
    data = ImageTextDataModule(str(root / "mixed.jsonl"), seq_len=160, cache=False)
    found = verify(module, data, spec, launch=Planted(pool, defect))
    assert data.max_pixels is None  # the user's own data module is as it was
    return found


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("qwen3_vl", "fsdp2:tp=2"),
        ("qwen3_vl_moe", "fsdp2:ep=2"),
        more("gemma3", "fsdp2:cp=2"),
        more("llava", "fsdp2"),
        ("llava_onevision", "3d:pp=2"),
        more("internvl", "3d:pp=2"),
        ("glm4v", "fsdp2:tp=2"),  # its tower reads a layer's weight outside of that layer
        ("gemma4", "fsdp2:cp=2"),  # one row of positions for all rows
        more("ovis2", "fsdp2:tp=2"),
        more("qwen2_vl", "fsdp2:tp=2"),
    ],
)
def test_the_same_numbers(family: str, spec: str, pool: RankPool, tmp_path: Path) -> None:
    found = report(pool, tmp_path, family, spec)
    assert found.exit_code == 0, found.findings


def features_of_other_tokens(patch: pytest.MonkeyPatch) -> None:
    original = at_decoder._numbers
    patch.setattr(at_decoder, "_numbers", lambda mark, sequences: original(mark, sequences).flip(0))


def test_features_at_the_wrong_tokens_are_found(pool: RankPool, tmp_path: Path) -> None:
    assert report(pool, tmp_path, "qwen3_vl", "fsdp2:cp=2").exit_code == 0
    assert report(pool, tmp_path, "qwen3_vl", "fsdp2:cp=2", features_of_other_tokens).exit_code == 1


def test_a_light_copy_has_no_model() -> None:
    """What is sent to the ranks: not even a hook leads back to the model."""
    module = ImageTextModule(model_of("llava"), processor=processor_of("llava"))
    size = sum(p.numel() * p.element_size() for p in model_of("llava").parameters())
    assert len(pickle.dumps(module.without_model())) < size / 4
