"""Two machines of two ranks each, in network namespaces, train as one device does."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks import DCPCheckpoint
from tests.callbacks.runs import train
from tests.namespaces import agent, machines
from tests.processes import Job

STOPS_IN = 6
HALT = "stands still"


def losses(root: Path, **options: Any) -> dict[int, float]:
    entries = train(root, [DCPCheckpoint()], attention_dropout=0.0, **options)["journal"]
    return {entry[1]: entry[3] for entry in entries if entry[0] == "train"}


def run(root: str) -> None:
    found = losses(Path(root), devices=2, strategy="hsdp:dp_replicate=2")
    (Path(root) / "losses.json").write_text(json.dumps(found))


class Accident(Callback):
    """A line for every step; in the first attempt the second machine stands still at `STOPS_IN`, to be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        stands_still = self.folder / "stands-still"
        if trainer.global_step + 1 == STOPS_IN and trainer.global_rank == 2 and not stands_still.exists():
            stands_still.touch()
            print(HALT, flush=True)
            time.sleep(3000)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            with (self.folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps([trainer.global_step, float(trainer.callback_metrics["train_loss"])]) + "\n")


def run_with_accident(root: str) -> None:
    callbacks = [Accident(Path(root)), DCPCheckpoint(every_n_steps=2)]
    layout = {"devices": 2, "strategy": "hsdp:dp_replicate=2", "attention_dropout": 0.0}
    train(Path(root), callbacks, ckpt_path="auto", **layout)


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


def test_a_killed_machine_that_comes_back_is_taken_in(tmp_path: Path) -> None:
    """The other goes on with it from the newest checkpoint; losses are those of one device."""
    alone = losses(tmp_path / "alone")
    root = tmp_path / "run"
    root.mkdir()
    with machines() as names:
        what = (run_with_accident, str(root))
        jobs = [Job(tmp_path / f"log-{number}", agent, names, number, *what) for number in range(2)]
        jobs[1].until(HALT)
        jobs[1].signal(signal.SIGKILL)
        back = Job(tmp_path / "log-back", agent, names, 1, *what)
        assert [job.wait(200) for job in (jobs[0], back)] == [[0], [0]], jobs[0].log() + back.log()
    lines = [json.loads(line) for line in (root / "losses.jsonl").read_text().splitlines()]
    assert [step for step, _ in lines] == [*range(1, STOPS_IN), *range(5, 11)], "it goes on from step 4"
    for step, loss in lines:
        assert loss == pytest.approx(alone[step], rel=1e-4)
