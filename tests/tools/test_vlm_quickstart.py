"""`make vlm`: what it prepares, and what it says of a model's answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from automodel_trainer.tools import vlm_answers, vlm_quickstart
from tests.processes import amt

COLORS = ("red", "blue", "green")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of one color, and what color it is, laid out as in the package."""
    source = tmp_path / "package"
    for split, count in (("train", 240), ("test", 12)):
        (source / split / "images").mkdir(parents=True)
        for index, color in enumerate(COLORS):
            Image.new("RGB", (64, 64), color).save(source / split / "images" / f"{index}.png")
        asked = [["what color is it?", COLORS[i % 3], i % 3] for i in range(count)]
        (source / split / "questions.json").write_text(json.dumps(asked))
    monkeypatch.setattr(vlm_quickstart, "find_data", lambda: source)
    return source


def test_prepared_trained_and_asked(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question that text alone answers in a third of the cases is answered by looking."""
    output = tmp_path / "out"
    for _ in range(2):
        model, data = vlm_quickstart.prepare(output)
    assert AutoProcessor.from_pretrained(model).image_token == "<image>"
    assert sum(p.numel() for p in AutoModelForImageTextToText.from_pretrained(model).parameters()) < 1e6
    config = Path(__file__).parent.parent.parent / "configs" / "vlm_quickstart.yaml"
    options = {
        "trainer.devices": 1, "trainer.default_root_dir": output, "trainer.enable_checkpointing": "false",
        "trainer.max_epochs": 6, "model.model": model, "model.scheduler.warmup_steps": 4,
        "data.train": data / "train.jsonl", "data.validation": data / "validation.jsonl", "data.seq_len": 64,
        "data.micro_batch_size": 4, "data.global_batch_size": 4,
    }  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    amt("fit", "--config", config, *(str(x) for k, v in options.items() for x in (f"--{k}", v)), folder=tmp_path)
    vlm_answers.main(["--output", str(output)])
    said = capsys.readouterr().out
    assert "12 questions about unseen pictures: 100.0% right; without looking, 33.3%." in said
    with Image.open(output / "answers.png") as sheet:
        assert sheet.width > sheet.height > 100


def test_without_the_package_or_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm_quickstart, "PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match="'no-such-package', which is not installed: run `make vlm`"):
        vlm_quickstart.find_data()
    with pytest.raises(ValueError, match=r"train.jsonl is not there. `make vlm` writes it"):
        vlm_answers.main(["--output", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no model"):
        vlm_answers.answers(tmp_path, [])
