"""A signal on any rank: a checkpoint, a clean stop, and a resumed run as if nothing had happened."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.callbacks.preemption import Preemption
from automodel_trainer.checkpoint import check_checkpoint
from tests.callbacks.runs import train
from tests.pool import RankPool

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class Signal(Callback):
    """Sends a signal to this process while a step runs, on one rank."""

    def __init__(self, step: int, number: int = signal.SIGTERM, rank: int = 0) -> None:
        self.step, self.number, self.rank = step, number, rank

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in HANDLED]


def preempted(root: Path, step: int, number: int, rank: int, devices: int, **options: Any) -> dict[str, Any]:
    before = handlers()
    preemption, checkpoint = Preemption(), DCPCheckpoint(every_n_epochs=100)
    result = train(root, [Signal(step, number, rank), preemption, checkpoint], devices=devices, **options)
    trainer = result["trainer"]
    return {
        "stopped_by": preemption.stopped_by,
        "step": trainer.global_step,
        "status": str(trainer.state.status.value),
        "journal": result["journal"],
        "last": Path(checkpoint.last_model_path).name,
        "restored": handlers() == before and trainer.limit_val_batches == 1.0,
    }


@pytest.mark.parametrize("number", HANDLED)
def test_one_device_stops_after_the_step(tmp_path: Path, number: int) -> None:
    """Step 3 is followed by a validation, which the resumed run does."""
    result = preempted(tmp_path, 3, number, 0, 1, min_steps=8, min_epochs=2)
    name = signal.Signals(number).name
    assert {key: value for key, value in result.items() if key != "journal"} == {
        "stopped_by": name,
        "step": 3,
        "status": "finished",
        "last": "step-00000003",
        "restored": True,
    }
    assert [entry[:2] for entry in result["journal"]] == [("train", 1), ("train", 2), ("train", 3)]
    check_checkpoint(tmp_path / "checkpoints" / "latest")
    whole = train(tmp_path / "whole")
    rest = train(tmp_path, ckpt_path="last")
    assert result["journal"] + rest["journal"] == whole["journal"]
    assert rest["journal"][0][:2] == ("val", 3)
    assert all(torch.equal(value, rest["weights"][name]) for name, value in whole["weights"].items())


@pytest.mark.parametrize("schedule", [{"val_check_interval": 3}, {"limit_val_batches": 0}], ids=str)
def test_stopped_after_every_step_a_run_is_as_uninterrupted(tmp_path: Path, schedule: dict[str, Any]) -> None:
    whole = train(tmp_path / "whole", **schedule)
    journal = []
    for step in range(1, 11):
        callbacks = [Signal(step), Preemption(), DCPCheckpoint(every_n_epochs=100)]
        part = train(tmp_path / "parts", callbacks, ckpt_path="last" if step > 1 else None, **schedule)
        journal += part["journal"]
    assert journal == whole["journal"]
    assert all(torch.equal(value, part["weights"][name]) for name, value in whole["weights"].items())


def test_a_signal_on_one_rank_stops_all_one_step_later(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(2, preempted, tmp_path, 3, signal.SIGUSR1, 1, 2, strategy="fsdp2")
    assert first == second
    assert first["stopped_by"] == "SIGUSR1"
    assert first["status"] == "finished"
    assert first["step"] == 4
    assert first["last"] == "step-00000004"
    assert first["restored"]


def test_a_signal_in_the_last_step_leaves_a_finished_run(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(2, preempted, tmp_path, 10, signal.SIGTERM, 1, 2, strategy="ddp")
    assert first["step"] == second["step"] == 10
    assert first["last"] == second["last"] == "step-00000010"
    assert first["stopped_by"] is second["stopped_by"] is None


def test_handlers_are_restored_when_training_fails(tmp_path: Path) -> None:
    class Failure(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert signal.getsignal(signal.SIGUSR1).__self__ is preemption  # type: ignore[union-attr]
            raise RuntimeError("on purpose")

    before, preemption = handlers(), Preemption()
    with pytest.raises(RuntimeError, match="on purpose"):
        train(tmp_path, [Failure(), preemption])
    assert handlers() == before


def test_only_the_main_thread_can_set_handlers(tmp_path: Path) -> None:
    finished = []
    thread = threading.Thread(
        target=lambda: finished.append(train(tmp_path, [Preemption()], max_steps=2, max_epochs=None))
    )
    before = handlers()
    thread.start()
    while thread.is_alive():
        assert handlers() == before
        time.sleep(0.01)
    assert finished[0]["trainer"].global_step == 2


def test_without_a_checkpoint_callback_it_says_that_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="SIGTERM received: stopping. There is no DCPCheckpoint"):
        result = train(tmp_path, [Signal(2), Preemption()], enable_checkpointing=False)
    assert result["trainer"].global_step == 2


def test_unknown_signals_are_refused() -> None:
    with pytest.raises(ValueError, match="SIGFOO"):
        Preemption(signals=["SIGFOO"])
