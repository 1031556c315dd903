"""Runs on a cluster, with a stand-in of Ray: what is checked, what travels, how errors and restarts come back."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.cluster import worker
from automodel_trainer.cluster.ray_train import check_address, check_cluster, check_workers, run_on_ray
from automodel_trainer.cluster.record import Outcome, Record, RecordStore
from automodel_trainer.cluster.versions import check_versions, versions
from automodel_trainer.cluster.worker import Output, check_file
from automodel_trainer.distributed import restarts
from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.distributed.ray_worker import ray_context
from automodel_trainer.tools import fit_on
from tests.cluster import fake_ray
from tests.kept_groups import own_groups
from tests.pool import RankPool
from tests.tiny import save_tiny_model, write_chats


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(restarts, "_memory", None)
    monkeypatch.setattr(restarts, "_launcher", "torchrun")
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    return fake_ray.install(monkeypatch, {"CPU": 4.0})


def run(task: Any, tmp_path: Path, **options: Any) -> Outcome:
    return run_on_ray(task, "ray", (1, 1), gpu=None, root=str(tmp_path), **options)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_no_cluster_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(ValueError, match=r"No Ray cluster answers at ray://127.0.0.1:\d+ .*ray start --head"):
            check_address(f"ray://127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("on", ["slurm", "ray://host", "http://host:1", ""])
def test_an_address_that_is_none(on: str) -> None:
    with pytest.raises(ValueError, match=r"is no cluster\. Give 'ray'"):
        check_address(on)


@pytest.mark.parametrize(
    ("workers", "dims", "said"),
    [
        (None, None, "workers=None is no number of workers"),
        ((4, 2), None, r"workers=\(4, 2\) is no number"),
        (3, ParallelDims(tp=2), "workers=3 does not fit the layout tp=2: .* Numbers that work: 2, 4, 6, 8"),
        (2, ParallelDims(tp=2, cp=2), "workers=2 does not fit the layout cp=2 × tp=2: .* Numbers that work: 4, 8"),
        ((2, 4), ParallelDims(dp_replicate=2), "workers=3 does not fit"),
    ],
)
def test_workers_that_do_not_fit(workers: Any, dims: ParallelDims | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_workers(workers, dims)


def test_a_cluster_that_is_too_small() -> None:
    assert check_cluster({"CPU": 16, "GPU": 8}, 8, None) is True
    with pytest.warns(UserWarning, match=r"workers=8, and the cluster has 4 GPU\(s\): this run computes on CPUs"):
        assert check_cluster({"CPU": 16, "GPU": 4}, 8, None) is False
    with pytest.raises(ValueError, match=r"workers=8 need one of the cluster's GPU\(s\) each, and it has 4"):
        check_cluster({"CPU": 16, "GPU": 4}, 8, True)
    with pytest.raises(ValueError, match=r"CPU\(s\) each, and it has 2"):
        check_cluster({"CPU": 2}, 8, None)


@own_groups
def refused(workers_a_node: int, other_torch: bool, file: str) -> str:
    """What a worker refuses; its last one is another than the others."""
    said: list[str] = []
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    driver = {**versions(), "torch": "1.13"} if other_torch and last else versions()

    def task() -> Outcome:
        worker.check_files({"data.train": file if last else "/"})
        return Outcome(None, None, 0, 1)

    def call(method: str, *args: Any) -> None:
        said.extend(args if method == "refuse" else ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"node-{int(os.environ['RANK']) // workers_a_node}")
        patch.setattr(restarts, "_memory", None)
        patch.setattr(restarts, "_launcher", "torchrun")
        dist.init_process_group("gloo")
        worker.work(worker.Given(call, task, driver, ".", {}))
    return "".join(said)


@pytest.mark.parametrize(
    ("workers_a_node", "other_torch", "file", "message"),
    [
        (2, False, "/", r"run different numbers of workers \(node-0 2, node-1 1\)"),
        (3, True, "/", r"on node-0 has other versions .*\(driver: 1.13\).* \(on rank 2\)"),
        (3, False, "/no/chats", r"data.train='/no/chats' is on the driver's machine .* \(on rank 2\)"),
    ],
)
def test_all_workers_refuse_together(
    workers_a_node: int, other_torch: bool, file: str, message: str, pool: RankPool
) -> None:
    """None waits in a collective for one that has refused."""
    for number, said in enumerate(pool.run(3, refused, workers_a_node, other_torch, file)):
        assert re.search(message, said), said
        assert said.endswith(f"(on worker {number}, node-{number // workers_a_node})")


def test_other_versions() -> None:
    check_versions(versions(), "node-1")
    with pytest.raises(ValueError, match=r"The worker on node-1 has other versions .*torch 2\.\d+ \(driver: 1.13\)"):
        check_versions({**versions(), "torch": "1.13"}, "node-1")


def test_a_worker_without_the_files(tmp_path: Path) -> None:
    check_file("data.train", str(tmp_path))
    check_file("data.train", "org/chats")
    with pytest.raises(ValueError, match=r"data.train='/no/chats.jsonl' is on the driver's machine"):
        check_file("data.train", "/no/chats.jsonl")


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'automodel-trainer\[ray\]'"):
        run(lambda: None, tmp_path)


def test_workers_without_a_cluster() -> None:
    with pytest.raises(ValueError, match="give on='ray' too"):
        Trainer(accelerator="cpu", logger=False).fit("model", "data", workers=2)


def press() -> int:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
    return 1


# --- what comes back --------------------------------------------------------------------------------------------------


def test_an_outcome_and_what_is_printed(ray: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def task() -> Outcome:
        os.write(1, b"step 1\n")  # not print: the driver prints in this process, too, and would print to itself
        os.write(2, b"step 2\n")
        return Outcome("/runs/a", None, 0, 1)

    assert run(task, tmp_path) == Outcome("/runs/a", None, 0, 1)
    assert "step 1\nstep 2\n" in capfd.readouterr().out
    assert ray.runs == 1
    assert not ray.running
    assert ray.scaling == {"num_workers": 1, "use_gpu": False}


def test_a_user_s_error_comes_back_without_another_try(ray: Any, tmp_path: Path, capfd: Any) -> None:
    def task() -> Outcome:
        raise ValueError("lr=-1 is no learning rate.")

    with pytest.raises(ValueError, match=r"lr=-1 is no learning rate. \(on worker 0, "):
        run(task, tmp_path)
    assert ray.runs == 1
    assert 'raise ValueError("lr=-1' in capfd.readouterr().out


def test_a_lost_worker_starts_again_and_is_told_its_run(ray: Any, tmp_path: Path, capfd: Any) -> None:
    found = []

    def task() -> Outcome:
        restarts._process.fits = 0  # a new process
        found.append(restarts.begin_fit())
        restarts.remember(tmp_path / "run")
        if len(found) < 3:
            raise RuntimeError("connection reset by peer")
        return Outcome(None, None, 0, 1)

    run(task, tmp_path)
    assert found == [None, tmp_path / "run", tmp_path / "run"]
    assert capfd.readouterr().out.count("RuntimeError: connection reset by peer") == 2


def test_a_worker_that_is_lost_again_and_again(ray: Any, tmp_path: Path) -> None:
    def task() -> Outcome:
        raise RuntimeError("the disk is broken")

    with pytest.raises(RuntimeError, match="the disk is broken"):
        run(task, tmp_path)
    assert ray.runs == 4


def test_ctrl_c_asks_the_workers_to_save(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    monkeypatch.setattr(worker, "stop_running", lambda name: asked.set())

    def task() -> Outcome:
        press()
        assert asked.wait(30)
        return Outcome("/runs/a", "SIGINT", 130, 1)

    assert run(task, tmp_path).exit_code == 130


def test_a_second_ctrl_c_ends_at_once(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed: list[int] = []
    monkeypatch.setattr(worker, "stop_running", lambda name: pressed or pressed.append(press()))
    monkeypatch.setattr(os, "_exit", lambda code: None)  # of the worker, which is this process here
    over = threading.Event()

    def task() -> Outcome:
        press()
        over.wait(30)
        return Outcome(None, None, 0, 1)

    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path)
    over.set()
    for thread in threading.enumerate():
        if thread.name == "ray":
            thread.join(30)


def test_what_keeps_values_over_restarts() -> None:
    record = Record()
    store = RecordStore(lambda name, *args: getattr(record, name)(*args))
    assert not store.check(["a"])
    store.set("a", "1")
    assert store.check(["a"])
    assert not store.check(["a", "b"])
    assert store.get("a") == b"1"
    record.refuse("first")
    record.refuse("second")
    assert record.error() == "first"


def test_output_is_whole_and_given_back(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    with open(1, "w", encoding="utf-8", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)  # as in a process of its own
        output = Output(lambda name, text: texts.append(text))
        print("ä" * 100_000)
        output.close()
        print("after", flush=True)
        monkeypatch.undo()
    assert "".join(texts) == "ä" * 100_000 + "\n"
    assert capfd.readouterr().out.endswith("after\n")


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "my-model")
    write_chats(tmp_path / "chats.jsonl", 20)
    return tmp_path


def test_fit_on_a_cluster_returns_the_checkpoint(ray: Any, home: Path) -> None:
    data = ChatDataModule("chats.jsonl", seq_len=128, global_batch_size=2)
    trainer = Trainer(accelerator="cpu", strategy="fsdp2", max_steps=1, default_root_dir="runs/a", logger=False)
    checkpoint = trainer.fit(CausalLMModule("my-model"), data, on="ray", workers=1)
    assert checkpoint is not None
    assert checkpoint.resolve() == home / "runs/a/checkpoints/step-00000001"
    assert trainer.exit_code == 0
    assert trainer.global_step == 0  # it ran elsewhere
    assert ray.config["storage_path"] == str(home / "runs/a/ray")


def test_the_command(ray: Any, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = home / "run.yaml"
    config.write_text("trainer: {max_steps: 1, accelerator: cpu, logger: false}\nmodel: {model: my-model}\n")
    options = ["--config", "run.yaml", "--data.train", "chats.jsonl", "--data.seq_len", "128"]
    on, workers, rest = fit_on.take(["fit", "--on", "ray", "--workers=1", *options])
    assert (on, workers, rest) == ("ray", 1, ["fit", *options])
    assert fit_on.fit_on("ray", 1, rest) == 0
    assert f"The newest checkpoint is {home / 'checkpoints/step-00000001'}." in capfd.readouterr().out


def test_a_trainer_in_a_worker_of_somebody_else(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """It takes Ray's ranks, and reports every checkpoint and the end."""
    reports = fake_ray.as_worker(monkeypatch)
    data = ChatDataModule("chats.jsonl", seq_len=128, global_batch_size=2)
    options: Any = {
        "accelerator": "cpu",
        "max_steps": 3,
        "default_root_dir": "runs/b",
        "logger": False,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(strategy="fsdp2", callbacks=[DCPCheckpoint(every_n_steps=2)], **options)
    assert type(trainer.strategy.cluster_environment).__name__ == "RayLightningEnvironment"
    newest = trainer.fit(CausalLMModule("my-model"), data)
    told = [json.loads(text or "{}").get("checkpoint") for _, text in reports]
    assert told[-1] == str(newest)
    assert str(newest.parent / "step-00000002") in told
    assert reports[-1][0]["step"] == 3
    assert reports[-1][0]["train_loss"] == float(trainer.callback_metrics["train_loss"])


def test_a_trial_of_tune_is_no_worker(ray: Any) -> None:
    def get_context() -> Any:
        raise DeprecationWarning("`ray.train.get_context` is deprecated when running in a function passed to Ray Tune.")

    sys.modules["ray.train"].__dict__.update(get_context=get_context)
    assert ray_context() is None


def test_options_of_the_command() -> None:
    assert fit_on.take(["fit", "--on=ray", "--workers", "4-8"]) == ("ray", (4, 8), ["fit"])
    assert fit_on.take(["validate", "--config", "a"]) == (None, None, ["validate", "--config", "a"])
    for wrong, said in (
        (["validate", "--on", "ray", "--workers", "2"], "options of amt fit"),
        (["fit", "--on", "ray"], "belong together"),
        (["fit", "--on", "ray", "--workers", "many"], "many is no number"),
    ):
        with pytest.raises(ValueError, match=said):
            fit_on.take(wrong)


def test_time_is_not_lost_where_nobody_asks(ray: Any, tmp_path: Path) -> None:
    began = time.monotonic()
    run(lambda: Outcome(None, None, 0, 1), tmp_path)
    assert time.monotonic() - began < 30
