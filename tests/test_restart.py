"""torchrun starts a run again after a rank was killed: it goes on by itself, on the same curve."""

from __future__ import annotations

import json
import os
import signal
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.distributed import restarts
from automodel_trainer.distributed.rendezvous import outliving_store
from automodel_trainer.resume import saved_before_restart
from automodel_trainer.trainer import Trainer
from tests.callbacks.runs import train
from tests.pool import RankPool
from tests.processes import Job, torchrun

KILLED_IN = 8


def again() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT") == "1"


class Diary(Callback):
    """A line for every step, written as it happens; rank 1 is killed in the middle of one, the first time."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step + 1 == KILLED_IN and trainer.global_rank == 1 and not again():
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            entry = [trainer.global_step, float(trainer.callback_metrics["train_loss"]), again()]
            with self.file.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")


def run(root: str) -> None:
    folder = Path(root)
    train(folder, [Diary(folder / "diary.jsonl"), DCPCheckpoint(every_n_steps=3)], devices=2, strategy="fsdp2")


def uninterrupted(root: Path) -> list[Any]:
    return [entry for entry in train(root, devices=2, strategy="fsdp2")["journal"] if entry[0] == "train"]


def test_torchrun_restarts_go_on(pool: RankPool, tmp_path: Path) -> None:
    whole, _ = pool.run(2, uninterrupted, tmp_path / "whole")
    train(tmp_path, [DCPCheckpoint()], max_steps=2, max_epochs=None)  # an earlier run, which is not to be gone on with
    job = Job(tmp_path / "log", torchrun, 1, run, str(tmp_path))
    assert job.wait(300) == [0], job.log()
    entries = [json.loads(line) for line in (tmp_path / "diary.jsonl").read_text().splitlines()]
    before, after = ([entry for entry in entries if entry[2] == again] for again in (False, True))
    assert [step for step, *_ in before] == list(range(1, KILLED_IN))
    assert [step for step, *_ in after] == list(range(7, 11)), "it goes on from the checkpoint of step 6"
    expected = {entry[1]: entry[3] for entry in whole}
    assert [loss for _, loss, _ in entries] == [expected[step] for step, *_ in entries]
    saved = tmp_path / "checkpoints-v1" / "step-00000006"
    assert f"torchrun has restarted this run: it resumes from {saved}" in job.log()


def test_a_script_that_fits_twice_is_restarted_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for attempt in range(2):
        monkeypatch.setattr(restarts._process, "fits", 0)  # a new process
        for fit in ("first", "second"):
            monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
            assert outliving_store(timedelta(seconds=1)) is None, "torchrun alone has one"
            for name, value in {**address, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
                monkeypatch.setenv(name, value)
            assert restarts.begin_fit() == (Path(fit) if attempt else None)
            restarts.remember(Path(fit))


def test_a_restart_that_nobody_remembers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(logger=False, accelerator="cpu", devices=1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.warns(UserWarning, match=r"it starts from the beginning.*Give ckpt_path='auto'"):
        assert saved_before_restart(trainer) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved_before_restart(trainer, "auto") is None
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        assert saved_before_restart(trainer) is None
