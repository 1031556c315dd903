"""Two machines of two ranks each, in network namespaces, train as one device does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from automodel_trainer.callbacks import DCPCheckpoint
from tests.callbacks.runs import train
from tests.namespaces import agent, machines
from tests.processes import Job


def losses(root: Path, **options: Any) -> dict[int, float]:
    entries = train(root, [DCPCheckpoint()], attention_dropout=0.0, **options)["journal"]
    return {entry[1]: entry[3] for entry in entries if entry[0] == "train"}


def run(root: str) -> None:
    found = losses(Path(root), devices=2, strategy="hsdp:dp_replicate=2")
    (Path(root) / "losses.json").write_text(json.dumps(found))


def test_two_machines_train_as_one_device(tmp_path: Path) -> None:
    alone = losses(tmp_path / "alone")
    root = tmp_path / "run"
    with machines() as names:
        jobs = [Job(tmp_path / f"log-{number}", agent, names, number, run, str(root)) for number in range(2)]
        for job in jobs:
            assert job.wait(120) == [0], job.log()
    found = {int(step): loss for step, loss in json.loads((root / "losses.json").read_text()).items()}
    assert found == pytest.approx(alone, rel=1e-4)
    saved = root / "checkpoints" / "latest"
    again = train(tmp_path / "again", ckpt_path=saved, max_epochs=3, attention_dropout=0.0)["trainer"]
    assert again.global_step == 15
