"""A run with pictures goes on with something changed: each setting of its module and its data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from automodel_trainer import ImageTextDataModule, ImageTextModule, Trainer
from tests.test_trainer import quiet
from tests.vlm.families import folder_of, rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(folder))))
    shutil.copytree(folder_of("llava", folder), folder / "model")
    fit(folder, folder / "run", 2)
    fit(folder, folder / "parts", 2, lr={"language": 1e-3, "*": 1e-2})
    return folder


def fit(home: Path, root: Path, steps: int, data: Any = None, resume: Any = None, **options: Any) -> Trainer:
    trainer = Trainer(**quiet(root, max_steps=steps))
    module = ImageTextModule(home / "model", **{"scheduler": "constant", **options})
    rows = ImageTextDataModule(str(home / "rows.jsonl"), seq_len=256, global_batch_size=2, **(data or {}))
    trainer.fit(module, rows, **({} if resume is None else {"ckpt_path": "last", "resume": resume}))
    return trainer


def copy(home: Path, name: str, root: Path) -> Path:
    return Path(shutil.copytree(home / name, root / "run", symlinks=True))


def other_processor(home: Path) -> Any:
    processor = AutoProcessor.from_pretrained(home / "model")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return processor


@pytest.mark.parametrize("name", ["freeze", "processor", "data processor", "min_pixels", "max_pixels", "image_mark"])
def test_refused(home: Path, tmp_path: Path, name: str) -> None:
    options, words = {
        "freeze": ({"freeze": ["vision", "projector"]}, "model.freeze .*: other weights are trained"),
        "processor": ({"processor": other_processor(home)}, "model.processor .* prepared otherwise"),
        "data processor": ({"data": {"processor": other_processor(home)}}, "model.processor .* prepared otherwise"),
        "min_pixels": ({"data": {"min_pixels": 5000}}, "data.min_pixels None → 5000"),
        "max_pixels": ({"data": {"max_pixels": 100}}, "data.max_pixels None → 100"),
        "image_mark": ({"data": {"image_mark": "<img>"}}, "data.image_mark <image> → <img>"),
    }[name]
    with pytest.raises(ValueError, match="cannot go on with what has changed") as error:
        fit(home, copy(home, "run", tmp_path), 3, resume="all", **options)  # type: ignore[arg-type]
    error.match(words)


def test_new_data_of_the_same_processor(home: Path, tmp_path: Path) -> None:
    trainer = fit(home, copy(home, "run", tmp_path), 4, resume="data", data={"max_pixels": 100})
    assert trainer.global_step == 4
    changed, root = {"processor": other_processor(home)}, copy(home, "run", tmp_path / "b")
    with pytest.raises(ValueError, match=r"model\.processor"):
        fit(home, root, 4, resume="data", data=changed)


def test_taken_over(home: Path, tmp_path: Path) -> None:
    """The same processor given by its path, and a learning rate for each part."""
    trainer = fit(home, copy(home, "run", tmp_path / "a"), 3, resume="all", data={"processor": str(home / "model")})
    assert trainer.global_step == 3
    rates = {"language": 5e-4, "*": 2e-3}
    trainer = fit(home, copy(home, "parts", tmp_path / "b"), 3, resume="all", lr=rates)
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == set(rates.values())


def test_other_parts_are_refused_with_what_to_do(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the same parts in lr.*resume='weights'"):
        fit(home, copy(home, "run", tmp_path), 3, resume="all", lr={"language": 1e-3, "*": 1e-2})


def test_a_run_from_the_weights_freezes_what_it_likes(home: Path, tmp_path: Path) -> None:
    root = copy(home, "run", tmp_path)
    assert fit(home, root, 1, resume="weights", freeze=["vision", "projector"]).global_step == 1
