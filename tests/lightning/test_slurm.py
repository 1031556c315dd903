"""Slurm's requeue, as Lightning has it: the signal saves, the job is queued again, and the next start goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment

from automodel_trainer.callbacks import DCPCheckpoint
from tests.harness import full
from tests.lightning.boring import loader, make, weight
from tests.processes import Job


class Signal(Callback):
    """Sends a signal in the middle of a step."""

    def __init__(self, step: int, number: int = signal.SIGUSR1) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A job of one task, with a `scontrol` that writes down what it is asked. Returns that file."""
    said = tmp_path / "bin" / "said"
    said.parent.mkdir()
    command = said.with_name("scontrol")
    command.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{said.parent}:{os.environ['PATH']}")
    job = {"JOB_ID": "12", "JOB_NAME": "train", "NTASKS": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in {**job, "NODEID": "0", "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return said


def fit(
    root: Path, *callbacks: Callback, plugins: Any = None, rows: int = 12, **options: Any
) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    module = BoringModel()
    defaults = {"max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 0, "callbacks": list(callbacks)}
    trainer = make(root, plugins=plugins, **{**defaults, **options})
    torch.manual_seed(1)
    trainer.fit(module, loader(rows, batch_size=2))
    return trainer, weight(module)


@pytest.mark.exact
@pytest.mark.parametrize("checkpoint", [DCPCheckpoint, ModelCheckpoint, None])
def test_a_job_is_queued_again_and_goes_on(slurm: Path, tmp_path: Path, checkpoint: Any) -> None:
    options = {} if checkpoint else {"enable_checkpointing": False}
    callbacks = [checkpoint()] if checkpoint else []
    _, whole = fit(tmp_path / "whole", *callbacks, **options)
    root = tmp_path / "run"
    first, _ = fit(root, Signal(3), *[type(c)() for c in callbacks], **options)
    assert first.global_step == 3
    assert first.exit_code == 0, "nobody else is to queue it again"
    assert slurm.read_text() == "requeue 12\n"
    assert not (root / "requeue").exists()
    assert (root / "hpc_ckpt_1.ckpt" / "trainer.json").is_file()
    second, rest = fit(root, *[type(c)() for c in callbacks], **options)
    assert second.global_step == 6
    assert torch.equal(rest, whole)


def task(job: dict[str, str], root: Path, step: int, strategy: str, kind: type[Callback]) -> None:
    """One of the two tasks that srun starts. The second gets the signal in `step`; 0: none of them."""
    rank = os.environ["RANK"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]  # torchrun's
    os.environ.update(job, SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_PROCID=rank, SLURM_LOCALID=rank)
    callbacks = [Signal(step)] if step and rank == "1" else []
    trainer, weights = fit(root, *callbacks, kind(), devices=2, strategy=strategy, rows=24)
    print("came to", trainer.global_step, trainer.exit_code, full(weights).double().sum().item())


@pytest.mark.exact
@pytest.mark.parametrize(("strategy", "kind"), [("ddp", DCPCheckpoint), ("fsdp2", ModelCheckpoint)])
def test_a_signal_to_one_of_two_ranks(slurm: Path, tmp_path: Path, strategy: str, kind: Any) -> None:
    """Both save after the same step, the job is queued again once, and the next start goes on."""

    def job(root: str, step: int) -> list[list[str]]:
        environment = {name: value for name, value in os.environ.items() if name == "PATH" or "SLURM" in name}
        ranks = Job(tmp_path / "logs", task, environment, tmp_path / root, step, strategy, kind, world_size=2)
        assert ranks.wait() == [0, 0], ranks.log()
        return [ranks.log(rank).partition("came to ")[2].split()[:3] for rank in range(2)]

    whole = job("whole", 0)
    assert [rank[:2] for rank in whole] == [["6", "0"]] * 2
    assert [rank[:2] for rank in job("run", 3)] == [["4", "0"]] * 2
    assert slurm.read_text() == "requeue 12\n"
    assert job("run", 0) == whole


def test_another_signal_and_an_array_job(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    plugin = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    before = signal.getsignal(signal.SIGUSR2)
    for number in (1, 2):
        trainer, _ = fit(tmp_path, Signal(2 * number, signal.SIGUSR2), plugins=[plugin])
        assert trainer.global_step == 2 * number
        assert (tmp_path / f"hpc_ckpt_{number}.ckpt").resolve().name == f"step-0000000{2 * number}"
    assert slurm.read_text() == "requeue 7_3\n" * 2
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_signal_before_the_first_step_waits_for_it(slurm: Path, tmp_path: Path) -> None:
    class Early(Callback):
        def on_sanity_check_start(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    trainer, _ = fit(tmp_path, Early(), num_sanity_val_steps=1, limit_val_batches=1)
    assert trainer.global_step == 1
    assert slurm.read_text() == "requeue 12\n"


def test_without_auto_requeue_the_scheduler_is_left_alone(slurm: Path, tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, Signal(2), plugins=[SLURMEnvironment(auto_requeue=False)])
    assert (trainer.global_step, trainer.exit_code, (tmp_path / "requeue").exists()) == (2, 75, True)
    assert not slurm.exists()
    assert not list(tmp_path.glob("hpc_ckpt_*"))


def test_where_scontrol_fails_the_script_is_told(slurm: Path, tmp_path: Path) -> None:
    slurm.with_name("scontrol").write_text("#!/bin/sh\nexit 3\n")
    with pytest.warns(UserWarning, match="scontrol requeue 12 ended with code 3"):
        trainer, _ = fit(tmp_path, Signal(2))
    assert (trainer.exit_code, (tmp_path / "requeue").exists()) == (75, True)


def test_a_run_that_went_on_is_resumed_where_it_came_to(slurm: Path, tmp_path: Path) -> None:
    """The link names a run, and the run has newer checkpoints. The one that it pointed to is gone."""

    class Fails(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("on purpose")

    def saves() -> DCPCheckpoint:
        return DCPCheckpoint(every_n_steps=1, keep_last=1)

    fit(tmp_path, Signal(2), saves())
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, Fails(), saves())
    assert not (tmp_path / "hpc_ckpt_1.ckpt").exists()
    trainer, _ = fit(tmp_path, saves())
    assert trainer.global_step == 6
    assert Path(trainer.resumed_path).name == "step-00000005"


def test_evaluation_uses_the_model_that_it_is_given(slurm: Path, tmp_path: Path) -> None:
    """Lightning's `test(model)` would test the weights of `hpc_ckpt_1.ckpt`."""
    fit(tmp_path, Signal(2))
    module = BoringModel()
    given = weight(module)
    make(tmp_path).test(module, loader(), verbose=False)
    assert torch.equal(weight(module), given)
    make(tmp_path).test(module, loader(), ckpt_path="hpc", verbose=False)
    assert not torch.equal(weight(module), given)


def test_hpc_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no hpc_ckpt_\*\.ckpt in"):
        make(tmp_path).fit(BoringModel(), ckpt_path="hpc")


def test_a_plugin_without_srun_is_one_process(tmp_path: Path) -> None:
    assert make(tmp_path, plugins=[SLURMEnvironment()]).world_size == 1
