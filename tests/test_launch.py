"""How processes are started: `devices=`, fork and spawn for notebooks, and what torchrun and srun decided before."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from automodel_trainer import Trainer
from automodel_trainer.distributed.launch import launched_sizes
from tests.processes import Job, in_folder, run_code, torchrun

SCRIPT = """
import sys
import time
from automodel_trainer import CausalLMModule, FSDP2Strategy, MockDataModule, Trainer
from tests.tiny import tiny_model

if __name__ == "__main__":
    launcher, root = sys.argv[1:]
    trainer = Trainer(
        strategy=FSDP2Strategy(launcher=launcher), accelerator="cpu", devices=2, max_steps=2, logger=False,
        default_root_dir=root, log_every_n_steps=1, enable_progress_bar=False,
    )
    data = MockDataModule(vocab_size=260, seq_len=16, global_batch_size=4, num_samples=16)
    path = trainer.fit(CausalLMModule(tiny_model(), lr=1e-2), data)
    print("PATH", path, "WORLD", trainer.world_size, "LOSS", "train_loss" in trainer.callback_metrics)
"""


def started(code: str, folder: Path, *arguments: str) -> Job:
    """A script, which may start itself again."""
    script = folder / "train.py"
    script.write_text(code)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return Job(folder, in_folder, folder, environment, run_code, code, script, *arguments)


@pytest.mark.parametrize("launcher", ["fork", "spawn"])  # subprocesses: below
def test_devices_starts_processes(launcher: str, tmp_path: Path) -> None:
    job = started(SCRIPT, tmp_path, launcher, str(tmp_path / "run"))
    assert job.wait(240) == [0], job.log()
    check_trained(job, tmp_path)


def check_trained(job: Job, tmp_path: Path) -> None:
    assert f"PATH {tmp_path / 'run/checkpoints/step-00000002'} WORLD 2 LOSS True" in job.log()
    assert (tmp_path / "run/checkpoints/step-00000002/rank-00001.json").is_file()


@pytest.fixture(autouse=True)
def nothing_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)


def test_without_a_launcher_nothing_changes() -> None:
    assert launched_sizes("auto", 1) == ("auto", 1)
    assert launched_sizes(4, 2) == (4, 2)


def test_torchrun_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert launched_sizes("auto", 1) == (4, 2)
    assert launched_sizes(4, 2) == (4, 2)
    with pytest.raises(ValueError, match=r"devices=8, but the launcher started 4 process"):
        launched_sizes(8, 1)
    with pytest.raises(ValueError, match=r"num_nodes=3, but torchrun started ranks on 2 node.*clocks of the"):
        launched_sizes(4, 3)


def test_srun_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launched_sizes("auto", 1) == (8, 2)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert launched_sizes("auto", 1) == ("auto", 1)


RAISES = """
import os, sys, threading
from lightning.pytorch.callbacks import Callback
from automodel_trainer import CausalLMModule, DDPStrategy, MockDataModule, Trainer
from tests.tiny import tiny_model

class Accident(Callback):
    def on_train_batch_start(self, trainer, *args):
        os.write(1, f"PID {os.getpid()}\\n".encode())  # at once: the ranks share a file
        trainer.strategy.barrier()  # however slow the machine is, both have printed
        if trainer.global_rank == 0:
            raise RuntimeError("on purpose, on one rank only")
        threading.Event().wait(3000)

if __name__ == "__main__":
    trainer = Trainer(
        strategy=DDPStrategy(), accelerator="cpu", devices=2, max_steps=2, logger=False, callbacks=[Accident()],
        default_root_dir=sys.argv[-1], enable_progress_bar=False,
    )
    data = MockDataModule(vocab_size=260, seq_len=16, global_batch_size=4, num_samples=16)
    trainer.fit(CausalLMModule(tiny_model(), lr=1e-2), data)
"""


def runs(pid: str) -> bool:
    """Whether there is such a process; one that has ended and that nobody has asked about does not count."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
def test_a_rank_that_raises_takes_the_others_along(launcher: str, tmp_path: Path) -> None:
    """Rank 0. With `devices=2` it has started the other: nobody but the watchdog would see to that.

    Before that a run of the same processes ends well.
    """
    if launcher == "devices":
        job = started(f"{SCRIPT}\n{RAISES}", tmp_path, "subprocess", str(tmp_path / "run"))
    else:
        job = Job(tmp_path, torchrun, 0, run_code, RAISES, tmp_path / "train.py", str(tmp_path / "run"))
    assert job.wait(600) != [0]
    log, seen = job.log(), time.time()
    if launcher == "devices":
        check_trained(job, tmp_path)
    pids = re.findall(r"PID (\d+)", log)
    assert len(pids) == 2
    while any(runs(pid) for pid in pids) and time.time() - seen < 300:
        time.sleep(0.1)
    assert not any(runs(pid) for pid in pids)
    assert re.findall(r"\w+Error: .*", log)[0] == "RuntimeError: on purpose, on one rank only", log


class EndsItself(BoringModel):
    """Gets SIGTERM in a validation step, as one of several ranks."""

    def validation_step(self, batch: Any, index: int) -> None:
        with mock.patch.object(Trainer, "world_size", 2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)  # a handler that waits for the other rank stays longer


def _validate(root: Path) -> None:
    Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=root).validate(EndsItself(), verbose=False)


def test_sigterm_ends_a_rank_where_nothing_saves(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_validate, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
