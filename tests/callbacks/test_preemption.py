"""A signal on any rank: a checkpoint, a clean stop, and a resumed run as if nothing had happened."""

from __future__ import annotations

import json
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

from automodel_trainer import Trainer
from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.callbacks.preemption import Preemption
from automodel_trainer.checkpoint import check_checkpoint
from tests.callbacks.runs import train
from tests.matrix import more
from tests.pool import RankPool
from tests.processes import Job
from tests.tiny import tiny_model, tiny_tokenizer

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


@pytest.mark.parametrize("number", [signal.SIGTERM, more(signal.SIGUSR1)])
@pytest.mark.exact
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


@pytest.mark.parametrize("schedule", [{"val_check_interval": 3}, more({"limit_val_batches": 0})], ids=str)
@pytest.mark.exact
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


class Slow(Callback):
    """Steps of 50 ms, counted on stdout."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(0.05)
        print(f"step {trainer.global_step + 1}", flush=True)


MOST = int(2 / 0.05) + 1  # steps until the limit: it is seen after a step


def limited(root: Path, devices: int, **options: Any) -> dict[str, Any]:
    limits = {"max_time": {"seconds": 2}, "max_epochs": None, "max_steps": 10_000, **options}
    trainer = train(root, [Slow(), DCPCheckpoint(every_n_steps=10)], devices=devices, **limits)["trainer"]
    last = Path(trainer.checkpoint_callback.last_model_path).name
    codes = (trainer.exit_code, trainer.callbacks[-2].exit_code)
    return {"by": trainer.stopped_by, "step": trainer.global_step, "last": last, "codes": codes}


def test_the_time_limit_is_kept_and_resumes_with_all_of_it_again(tmp_path: Path) -> None:
    result = limited(tmp_path, 1)
    assert result["by"] == "max_time"
    assert 1 <= result["step"] <= MOST, "however few of them a busy machine gets done"
    assert result["last"] == f"step-{result['step']:08d}"
    assert result["codes"][0] == 75
    assert (tmp_path / "requeue").read_text() == "max_time\n"
    again = train(tmp_path, ckpt_path="auto", max_time={"minutes": 5}, max_epochs=None, max_steps=result["step"] + 2)
    # Where the limit fell on the end of an epoch, its validation comes first.
    trained = [step for what, step, *_ in again["journal"] if what == "train"]
    assert trained == [result["step"] + 1, result["step"] + 2]
    assert again["trainer"].exit_code == 0
    assert not (tmp_path / "requeue").exists()


def test_ranks_agree_on_the_time(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(2, limited, tmp_path, 2, strategy="ddp")
    assert first["by"] == second["by"] == "max_time"
    assert first["step"] == second["step"]
    assert first["last"] == second["last"] == f"step-{first['step']:08d}"
    assert first["codes"][0] == 0, "torchrun would start the run again"
    assert (tmp_path / "requeue").exists()


def test_a_limit_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not to both"):
        Trainer(max_time="00:00:10:00", callbacks=[Preemption(max_time="00:00:10:00")])


def amt_fit(root: Path, *options: str) -> None:
    """`amt fit` in this process, with a worker for the data."""
    from automodel_trainer.cli import main

    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    config = {
        "trainer": {
            "accelerator": "cpu", "default_root_dir": str(root), "logger": False, "enable_progress_bar": False,
            "callbacks": [{"class_path": "tests.callbacks.test_preemption.Slow"}],
        },
        "model": {"model": str(root / "model"), "lr": 1e-3},
        "data": {
            "class_path": "MockDataModule",
            "init_args": {"vocab_size": 264, "seq_len": 16, "num_samples": 2000, "num_workers": 1},
        },
    }  # fmt: skip
    (root / "run.json").write_text(json.dumps(config))
    main(["fit", "--config", str(root / "run.json"), *options])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), more(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_amt_fit_saves_and_tells_the_scheduler(number: int, code: int, tmp_path: Path) -> None:
    """The signal goes to the whole process group, data worker included, as terminals and torchrun send it."""
    job = Job(tmp_path, amt_fit, tmp_path)
    job.until("step 3")
    job.signal(number)
    assert job.wait() == [code], job.log()
    check_checkpoint(tmp_path / "checkpoints" / "latest")
    assert "worker" not in job.log().lower().replace("does not have many workers", ""), job.log()
    assert (tmp_path / "requeue").exists() == (code == 75)


def stuck_step(root: Path) -> None:
    train(root, [Stuck()])


class Stuck(Callback):
    """A step that never ends, in C as a collective would be; Python runs again only once it is over."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            print("stuck", flush=True)
            for _ in range(12_000):
                time.sleep(0.05)  # the first Ctrl-C is heard here


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, stuck_step, tmp_path)
    job.until("stuck")
    job.signal(signal.SIGINT)
    job.until("Press again to stop now")
    job.signal(signal.SIGINT)
    assert job.wait() == [-signal.SIGINT]  # the step would take longer than is waited here
    assert not list(tmp_path.glob("checkpoints/step-*"))
