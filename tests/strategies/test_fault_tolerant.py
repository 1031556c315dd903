"""Replica groups that are killed and come back: the run is the one that nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from automodel_trainer import FaultTolerantStrategy
from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.checkpoint import folder
from automodel_trainer.strategies import StrategyRegistry
from automodel_trainer.strategies.fault_tolerant import _torchft
from automodel_trainer.strategies.fault_tolerant._torchft import Peers, require_lighthouse
from automodel_trainer.strategies.fault_tolerant.lifeline import NOWHERE, Lifeline
from tests.beside import use
from tests.callbacks.runs import train
from tests.matrix import more
from tests.pool import _free_port as free_port
from tests.processes import Job

ROWS = 8  # of a global batch
BETWEEN = 12  # steps between two kills
ALONE = 2  # steps that a group makes alone before it waits for the other
FULL: dict[str, Any] = {"attention_dropout": 0.0}
LORA: dict[str, Any] = {**FULL, "precision": "bf16", "module": {"lora": {"rank": 4}}}


class Diary(Callback):
    """Writes down each step as it ends: its number, its loss, the rows of this rank."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        rows = [number for micro_batch in batch for number in micro_batch["sample_ids"]]
        entry = [trainer.global_step, float(trainer.callback_metrics["train_loss"]), rows]
        with (self.folder / f"{self.name}-{trainer.global_rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


def diary(folder: Path, name: str) -> list[tuple[int, float, list[int]]]:
    """The steps, with the rows of all ranks."""
    files = sorted(folder.glob(f"{name}-*.jsonl"))
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [(step[0][0], step[0][1], sorted(row for *_, rows in step for row in rows)) for step in zip(*ranks)]


class Fate(Callback):
    """Kills a group in the forward of a step, or lets it miss that others have a step; a group does not go alone long.

    Args:
        comes, waits: files that say that this group, and the other, is there.
        dies_in: the step in which this group ends.
        misses: a step that is whole, and that this group takes for lost.
    """

    def __init__(self, comes: Path, waits: Path, dies_in: int | None, misses: int | None) -> None:
        self.comes, self.waits, self.dies_in, self.misses, self.alone = comes, waits, dies_in, misses, 0

    def on_fit_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.comes.touch()

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step + 1 == self.dies_in:
            self.comes.unlink(missing_ok=True)
            module.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if trainer.global_step + 1 == self.misses:
            peers: Peers = trainer.strategy._peers
            commit = peers.commit

            def misses() -> bool:
                peers._manager.report_error(RuntimeError("lost on the last metre"))
                peers.commit = commit  # type: ignore[method-assign]
                return commit()

            peers.commit = misses  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        taken = sum(len(micro_batch["sample_ids"]) for micro_batch in batch)
        self.alone = self.alone + 1 if taken * trainer.world_size == ROWS else 0
        while self.alone >= ALONE and not self.waits.exists():
            time.sleep(0.02)
        if self.alone >= ALONE:
            time.sleep(0.1)


class Gates(Callback):
    """Waits after some steps until other groups are there; kills a group in the forward of a step.

    Args:
        comes: a file that says that this group is there.
        gates: files to wait for after steps.
        dies_in: the step in which this group ends.
    """

    def __init__(self, comes: Path, gates: dict[int, Path], dies_in: int | None = None) -> None:
        self.comes, self.gates, self.dies_in = comes, gates, dies_in

    def on_fit_start(self, *args: Any) -> None:
        self.comes.touch()

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step + 1 == self.dies_in:
            module.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        while (gate := self.gates.get(trainer.global_step)) is not None and not gate.exists():
            time.sleep(0.02)
        time.sleep(0.05)  # others have time to come

    def on_save_checkpoint(self, trainer: Any, *args: Any) -> None:
        """As the objective sums the losses since the last log step: all ranks of a group must make the state."""
        assert trainer.strategy.sum_over_rows(torch.ones(())) == trainer.world_size


def group(root: Path, number: int, lighthouse: str, fate: Callback, options: dict) -> None:
    use("torchft")
    callbacks = [Diary(root, f"group-{number}"), fate, DCPCheckpoint(every_n_steps=4, keep_last=None)]
    strategy = f"hsdp:fault_tolerant=true,lighthouse={lighthouse},replica_timeout=20"
    ran = train(root, callbacks, strategy=strategy, devices=int(os.environ.get("WORLD_SIZE", 1)), **options)
    if ran["trainer"].is_global_zero:
        torch.save(ran["weights"], root / f"weights-{number}.pt")


def goes_alone(root: Path, job: Job) -> None:
    """Wait until the first group has made a step without the other."""
    end = time.monotonic() + 300
    while not (lines := diary(root, "group-0")) or len(lines[-1][2]) < ROWS:
        assert time.monotonic() < end, job.log()
        time.sleep(0.05)


def comes(root: Path, name: str, step: int, job: Job) -> None:
    """Wait until a group has made a step."""
    end = time.monotonic() + 300
    while not (lines := diary(root, name)) or lines[-1][0] < step:
        assert time.monotonic() < end, job.log()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("kills", "ranks", "options", "near"), [(2, 1, FULL, 1e-5), more(10, 1, FULL, 1e-5), more(2, 2, LORA, 1e-2)]
)
def test_the_curve_is_that_of_a_run_without_kills(
    tmp_path: Path, lighthouse: str, kills: int, ranks: int, options: dict[str, Any], near: float
) -> None:
    root, options = tmp_path / "both", {**options, "max_epochs": 3 * kills}
    root.mkdir()

    def fate(number: int, dies_in: int | None = None, misses: int | None = None) -> Fate:
        return Fate(root / f"there-{number}", root / f"there-{1 - number}", dies_in, misses)

    survivor = Job(tmp_path / "0", group, root, 0, lighthouse, fate(0), options, world_size=ranks)
    for life in range(kills + 1):
        goes_alone(root, survivor)
        died = 5 + BETWEEN * (life - 1)
        own = fate(1, dies_in=died + BETWEEN) if life < kills else fate(1, misses=died + BETWEEN - 2)
        job = Job(tmp_path / f"1-{life}", group, root, 1, lighthouse, own, options, world_size=ranks)
        if life < kills:
            assert job.wait() == [-signal.SIGKILL] * ranks, job.log() + survivor.log()
    assert survivor.wait() == [0] * ranks, survivor.log()
    assert job.wait() == [0] * ranks, job.log()

    plain = train(tmp_path, [Diary(tmp_path, "plain")], **options)
    expected, first, second = diary(tmp_path, "plain"), diary(root, "group-0"), diary(root, "group-1")
    assert [step for step, *_ in first] == [step for step, *_ in expected], "no step is lost, and none is done twice"
    beside = {step: rows for step, _, rows in second}
    assert len(beside) == len(second) > 3 * kills
    for (step, loss, rows), (_, right, all_rows) in zip(first, expected, strict=True):
        assert loss == pytest.approx(right, rel=near), step
        assert sorted(rows + beside.get(step, [])) == all_rows, step
    missed = died + BETWEEN - 2
    assert all(loss == first[step - 1][1] for step, loss, _ in second if step != missed)
    repeated = [log.count("A replica group was lost in this step") for log in (survivor.log(), job.log())]
    assert repeated == [kills, 1], "the steps in flight, and the one that the second group missed"
    assert survivor.log().count("A replica group came back in step") == kills + 1
    assert job.log().count("This replica group is back in step") == 1
    assert "rehearsed before that for" in job.log()
    weights = [torch.load(root / f"weights-{number}.pt") for number in (0, 1)]
    for name, right in plain["weights"].items():
        torch.testing.assert_close(weights[0][name], right, rtol=10 * near, atol=3 * near)
        assert torch.equal(weights[0][name], weights[1][name]), name
    goes_on_alone(root / "checkpoints", tmp_path / "on", plain["weights"], expected[-1][0], options, near)


def goes_on_alone(
    saved: Path, root: Path, weights: dict[str, torch.Tensor], last: int, options: dict[str, Any], near: float
) -> None:
    """All checkpoints are there, and a plain run resumes from one."""
    steps = {*range(4, last + 1, 4), last}
    assert {folder.name for folder in saved.glob("step-*")} == {f"step-{step:08}" for step in steps}
    on = train(root, ckpt_path=saved / f"step-{(last - 1) // 4 * 4:08}", **options)
    for name, right in weights.items():
        torch.testing.assert_close(on["weights"][name], right, rtol=10 * near, atol=3 * near)


@pytest.mark.parametrize("ranks", [more(1), more(2)])
def test_three_groups_of_which_two_are_lost_at_once(tmp_path: Path, lighthouse: str, ranks: int) -> None:
    """The second and the third end in one step, and the second comes back."""
    root, options = tmp_path / "all", {**FULL, "max_epochs": 14}
    root.mkdir()
    there = [root / f"there-{name}" for name in ("0", "1", "2", "1-again")]

    def start(number: int, comes: Path, gates: dict[int, Path], dies_in: int | None = None) -> Job:
        own = Gates(comes, gates, dies_in)
        return Job(tmp_path / comes.name, group, root, number, lighthouse, own, options, world_size=ranks)

    first = start(0, there[0], {2: there[1], 17: there[2], 46: there[3]})
    goes_alone(root, first)
    second = start(1, there[1], {}, dies_in=45)
    comes(root, "group-1", 17, first)  # then two groups have the state that the third is given
    third = start(2, there[2], {}, dies_in=45)
    assert second.wait() == third.wait() == [-signal.SIGKILL] * ranks, first.log() + second.log() + third.log()
    comes(root, "group-0", 46, first)
    again = start(1, there[3], {})
    assert first.wait() == again.wait() == [0] * ranks, first.log() + again.log()

    plain = train(tmp_path, [Diary(tmp_path, "plain")], **options)
    diaries = [{step: (loss, rows) for step, loss, rows in diary(root, f"group-{number}")} for number in range(3)]
    expected = {step: (loss, rows) for step, loss, rows in diary(tmp_path, "plain")}
    assert diaries[0].keys() == expected.keys() > diaries[1].keys() > diaries[2].keys()
    assert len(diaries[2]) > 10
    assert 45 not in diaries[1]
    assert 70 in diaries[1]
    for step, (right, all_rows) in expected.items():
        found = [entries[step] for entries in diaries if step in entries]
        assert [loss for loss, _ in found] == [found[0][0]] * len(found), step
        assert found[0][0] == pytest.approx(right, rel=1e-5), step
        assert sorted(row for _, rows in found for row in rows if row >= 0) == all_rows, step
    for name, right in plain["weights"].items():
        torch.testing.assert_close(torch.load(root / "weights-0.pt")[name], right, rtol=1e-4, atol=3e-5)
        assert torch.equal(torch.load(root / "weights-1.pt")[name], torch.load(root / "weights-0.pt")[name]), name


def test_a_lifeline_breaks_with_the_process_at_its_end(tmp_path: Path) -> None:
    lost = threading.Event()
    line = Lifeline("127.0.0.1", lost.set)
    job = Job(tmp_path, holds_a_lifeline, str(tmp_path / "address"))
    job.until("there")
    line.watch([NOWHERE, json.loads((tmp_path / "address").read_text())])
    assert not lost.wait(0.5)
    job.signal(signal.SIGKILL)
    assert lost.wait(5)
    line.cut()


def holds_a_lifeline(file: str) -> None:
    line = Lifeline("127.0.0.1", lambda: None)
    Path(file).write_text(json.dumps(line.address))
    print("there")
    time.sleep(600)


def test_a_lifeline_that_was_cut_or_replaced_tells_nobody() -> None:
    lost = threading.Event()
    lines = [Lifeline("127.0.0.1", lost.set) for _ in range(3)]
    lines[0].watch([lines[1].address])
    lines[0].watch([lines[2].address])
    lines[1].cut()
    assert not lost.wait(0.5)
    lines[0].cut()
    lines[2].cut()
    assert not lost.wait(0.5)


# --- what torchft does ---


def counts_groups(port: int) -> None:
    """A lighthouse, until it is killed."""
    use("torchft")
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind=f"[::]:{port}", min_replicas=1, join_timeout_ms=10000, heartbeat_timeout_ms=1000)
    print(f"lit at {server.address()}")
    time.sleep(600)


def meets_twice(port: int, dark: Path) -> None:
    """A step, then another once the lighthouse is away."""
    use("torchft")
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place: dict[str, Any] = {"lighthouse": f"http://localhost:{port}", "store": ("localhost", store.port)}
    times: dict[str, Any] = {"timeout": 5, "quorum_timeout": 30}
    peers = Peers(rank=0, ranks=1, device=torch.device("cpu"), load=lambda state: None, **place, **times)
    assert peers.meet(10) == (0, 1)
    assert peers.commit()
    print("the first step is done")
    while not dark.exists():
        time.sleep(0.02)
    assert peers.meet(60) == (0, 1)
    assert peers.commit()
    assert peers.step == 2
    peers.leave()


def test_a_lighthouse_that_is_started_again(tmp_path: Path) -> None:
    """The groups wait for it."""
    use("torchft")
    port, dark = free_port(), tmp_path / "dark"
    lighthouse = Job(tmp_path / "1", counts_groups, port)
    lighthouse.until("lit")
    group = Job(tmp_path / "group", meets_twice, port, dark)
    group.until("the first step is done", timeout=60)
    lighthouse.signal(signal.SIGKILL)
    assert lighthouse.wait(10) == [-signal.SIGKILL]
    dark.touch()
    time.sleep(1)
    assert group.ranks[0].is_alive(), group.log()
    again = Job(tmp_path / "2", counts_groups, port)
    assert group.wait() == [0], group.log()
    again.signal(signal.SIGKILL)
    again.wait(10)


def test_nobody_waits_for_a_slow_reader() -> None:
    use("torchft")
    from automodel_trainer.strategies.fault_tolerant._transport import Transport

    limit = timedelta(seconds=30)
    server, late = Transport(limit), Transport(limit)
    place = urlsplit(server.metadata())
    for step in (3, 4):
        server.send_checkpoint([1], step, {"user": {"default": {}}, "torchft": {"step": step}}, limit)
        assert server.asked
        server.give({"weights": torch.full((2**23,), step)})
        slow = socket.create_connection(("localhost", place.port))
        slow.sendall(f"GET {place.path}{step}/full HTTP/1.0\r\n\r\n".encode())
        assert slow.recv(4) == b"HTTP"
        state = late.recv_checkpoint(0, f"http://localhost:{place.port}{place.path}", step, limit)
        assert state["user"]["default"]["weights"].eq(step).all()
        begun = time.monotonic()
        server.disallow_checkpoint()
        assert time.monotonic() - begun < 1
        slow.close()


def test_a_checkpoint_that_another_group_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remains of crashed saves go: those of this group's step at once, others when nobody has written for an hour."""
    monkeypatch.setattr(folder.neighbours, "present", True)
    names = ("step-1.tmp", "step-2.tmp", "step-3.tmp", "step-0.tmp-gone")
    for name in names:
        (tmp_path / name / "model").mkdir(parents=True)
    long_ago = time.time() - 2 * 3600
    for old in ("step-1.tmp", "step-0.tmp-gone"):
        os.utime(tmp_path / old, (long_ago, long_ago))
    os.utime(tmp_path / "step-0.tmp-gone" / "model", (long_ago, long_ago))
    target = folder.prepare(tmp_path / "step-3")
    assert {path.name for path in tmp_path.iterdir()} == {"step-1.tmp", "step-2.tmp", "step-3.tmp"}
    assert not list(target.iterdir())
    folder.abandon(target)


# --- bad input --------------------------------------------------------------------------------------------------------


def lonely(root: str, address: str) -> None:
    use("torchft")
    strategy = FaultTolerantStrategy(lighthouse=address, min_replicas=2, timeout=timedelta(seconds=2))
    with pytest.raises(ValueError, match="min_replicas=2 replica groups are needed and 1 met within 2 s"):
        train(Path(root), strategy=strategy, max_epochs=1)


def test_too_few_groups(tmp_path: Path, lighthouse: str) -> None:
    job = Job(tmp_path / "log", lonely, str(tmp_path), lighthouse)
    assert job.wait() == [0], job.log()
    assert "Waiting for min_replicas=2 replica groups; there are 1." in job.log()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("fault_tolerant=true,dp_replicate=1", "Allowed: 2 or more"),
        ("fault_tolerant=true,min_replicas=3", "allowed is 1 to 2, the groups that are started"),
        ("fault_tolerant=true,tp=2,ep=4", "not with tp=2, ep=4"),
        ("fault_tolerant=true,replica_timeout=0", "must be more than 0 seconds"),
        ("min_replicas=2", "add fault_tolerant=true"),
    ],
)
def test_options_that_do_not_fit(options: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StrategyRegistry.get(f"hsdp:{options}")


def test_no_lighthouse_and_no_torchft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_torchft.LIGHTHOUSE, raising=False)
    with pytest.raises(ValueError, match="needs the address of a lighthouse"):
        _torchft.lighthouse_address(None)
    with pytest.raises(ValueError, match=r"'nowhere' is no address. Write http://HOST:PORT"):
        _torchft.lighthouse_address("nowhere")
    assert _torchft.lighthouse_address("host:1") == "http://host:1"
    with pytest.raises(ValueError, match=r"No lighthouse answers at http://127.0.0.1:9 .*torchft_lighthouse"):
        require_lighthouse("http://127.0.0.1:9", patience=0)
    monkeypatch.setattr(_torchft.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'automodel-trainer\[ft\]'"):
        _torchft.require_torchft()


def test_a_group_that_fell_behind_starts_again() -> None:
    strategy = FaultTolerantStrategy(lighthouse="host:1")
    strategy._lightning_module = SimpleNamespace(_trainer=SimpleNamespace(global_step=5))  # type: ignore[assignment]
    strategy._peers, strategy._met = SimpleNamespace(step=9), SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"fell 4 steps behind the others.*Start it again"):
        strategy._caught_up()


def test_ranks_that_got_different_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of a group go back to their own step and ask again, also those that got the state of the others."""
    fault, calls = FaultTolerantStrategy(lighthouse="host:1"), []
    fault._peers = SimpleNamespace(  # type: ignore[assignment]
        asked=False,
        failed=True,
        why="it broke",
        commit=lambda: calls.append("commit"),
        fall_back=lambda: calls.append("back"),
    )
    fault._message = {}
    monkeypatch.setattr(fault, "_any", lambda *facts: [*facts])
    assert not fault._is_whole(0, 2)
    assert calls == ["commit", "back"]
    assert fault._message is fault._given is None


def test_a_loader_that_has_dealt_its_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="use strategy='hsdp' with it"):
        FaultTolerantStrategy(lighthouse="host:1").take_gradients(None, [{}])  # type: ignore[arg-type]
