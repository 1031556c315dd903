"""Ranks that hang, raise or vanish: real processes, whose main threads wait in something that nothing interrupts."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks.side_channel import SideChannel
from automodel_trainer.callbacks.stacks import current_call
from automodel_trainer.callbacks.watch import place_table
from automodel_trainer.callbacks.watchdog import Watchdog
from automodel_trainer.distributed.phase import current, during_phase, enter_phase
from tests.callbacks.runs import train
from tests.kept_groups import own_groups
from tests.pool import RankPool
from tests.processes import Job

STEP = 3
SILENCE = 20  # seconds: on a busy machine a healthy rank may be silent for some


class Accident(Callback):
    """In step 3 a rank hangs, raises or is killed; what the other waits for then never comes, as with NCCL."""

    def __init__(self, kind: str, rank: int = 1) -> None:
        self.kind, self.rank = kind, rank

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step + 1 != STEP:
            return
        if trainer.global_rank != self.rank or self.kind == "hangs":
            print("waits", flush=True)
            threading.Event().wait(3000)  # nothing wakes it, and no test waits that long
        if self.kind == "raises":
            raise RuntimeError("on purpose, on one rank only")
        os.kill(os.getpid(), signal.SIGKILL)


def accident(root: Path, kind: str, rank: int = 1) -> None:
    silence = SILENCE if kind == "hangs" else 3000
    train(root, [Watchdog(silence=silence), Accident(kind, rank)], devices=2, strategy="fsdp2")


@pytest.fixture(scope="module")
def accidents(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Job, Path]]:
    """Jobs and their folders. They begin together, for they mostly wait: that of the one that hangs is seen last."""
    jobs = {}
    for kind, rank in (("hangs", 1), ("raises", 1), ("raises", 0)):
        folder = tmp_path_factory.mktemp(f"{kind}-{rank}")
        jobs[kind, rank] = Job(folder, accident, folder, kind, rank, world_size=2), folder
    return jobs


def test_a_rank_that_raises_ends_the_others(accidents: dict[tuple[str, int], tuple[Job, Path]]) -> None:
    job, _ = accidents["raises", 1]
    assert job.wait() == [1, 1]
    log = job.log()
    assert "waits" in log
    assert "rank 1 raised\nTraceback" in log
    assert log.index("RuntimeError: on purpose, on one rank only") < log.index("rank  step  phase"), "traceback first"
    assert "RuntimeError: on purpose" in job.log(1)


def test_rank_0_that_raises_ends_the_others(accidents: dict[tuple[str, int], tuple[Job, Path]]) -> None:
    job, _ = accidents["raises", 0]
    assert job.wait() == [1, 1]
    assert "waits" in job.log(1)
    assert "Rank 1 ends: rank 0 raised\nTraceback" in job.log(1)
    assert "RuntimeError: on purpose" in job.log(0)


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    """Rank 0 is the one that goes: the others lose the store with it, and speak for themselves."""
    job = Job(tmp_path, accident, tmp_path, "hangs", world_size=2)
    job.until("waits")
    job.signal(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL, 1]
    assert "Rank 1 ends: rank 0, which has the store, is gone" in job.log(1)


def all_raise(root: Path) -> str:
    class Failure(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            time.sleep(0.5 * trainer.global_rank)
            raise ValueError(f"rank {trainer.global_rank}")

    with pytest.raises(ValueError, match=r"rank \d") as caught:
        train(root, [Failure()], devices=2, strategy="ddp")
    time.sleep(1.5)
    return f"{caught.value}, {[thread.name for thread in threading.enumerate() if thread.name == 'watchdog']}"


def test_ranks_that_all_raise_do_so_themselves(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(2, all_raise, tmp_path) == ["rank 0, []", "rank 1, []"]


def phases(root: Path) -> tuple[list[str], int]:
    seen: list[str] = []

    class Spy(Watchdog):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(f"{current.step} {current.phase}")
            super().on_train_batch_end(*args)

    train(root, [Spy()], devices=2, strategy="fsdp2", max_steps=2, max_epochs=None)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        enter_phase("forward")
    finally:
        sys.setprofile(None)
    return seen, sum(event in ("call", "c_call") for event in calls)


def test_a_healthy_run_is_left_alone_and_says_where_it_is(pool: RankPool, tmp_path: Path) -> None:
    for seen, calls in pool.run(2, phases, tmp_path):
        assert seen == ["1 optimizer", "2 optimizer"]
        assert calls <= 5, "it is called many times a step: function calls, for time depends on what else runs"


def unreachable(root: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        original, SideChannel.__init__ = SideChannel.__init__, refuse  # type: ignore[method-assign]
        try:
            step = train(root, [Watchdog()], devices=2, strategy="ddp", max_steps=1, max_epochs=None)[
                "trainer"
            ].global_step
        finally:
            SideChannel.__init__ = original  # type: ignore[method-assign]
    return [f"{step}", *(str(w.message) for w in caught if "not watched" in str(w.message))]


def refuse(self: SideChannel, rank: int, world_size: int, host: str, port: int | None) -> None:
    raise RuntimeError("connection refused")


def test_a_run_trains_also_where_nothing_can_be_watched(pool: RankPool, tmp_path: Path) -> None:
    for rank, (step, *said) in enumerate(pool.run(2, unreachable, tmp_path)):
        assert step == "1"
        reason = "no connection to a store of rank 0 (connection refused)"
        assert said == [f"Rank {rank} is not watched for hangs: {reason}."]


def test_one_rank_is_not_watched(tmp_path: Path) -> None:
    watchdog = Watchdog()
    train(tmp_path, [watchdog], max_steps=1, max_epochs=None)
    assert not watchdog.active


def test_a_phase_inside_a_phase() -> None:
    enter_phase("data", 7)
    with during_phase("save"):
        assert (current.step, current.phase) == (7, "save")
    assert current.phase == "data"
    with pytest.raises(OSError, match="full"), during_phase("save"):
        raise OSError("full")
    assert current.phase == "save", "where it failed"


@own_groups
def waits_alone(folder: Path) -> tuple[str, str]:
    """The first of two ranks in a collective; the other comes once that has been seen."""
    seen, found = folder / "seen", ("", "")
    dist.init_process_group("gloo")
    dist.barrier()

    def look() -> None:
        nonlocal found
        end = time.monotonic() + 300
        while not found[0] and time.monotonic() < end:
            time.sleep(0.01)
            found = current_call()
        seen.touch()

    if dist.get_rank() == 0:
        thread = threading.Thread(target=look)
        thread.start()
        dist.all_reduce(torch.ones(1))
        thread.join()
        return found
    while not seen.exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(1))
    return current_call()


def test_the_collective_is_read_from_the_stack(pool: RankPool, tmp_path: Path) -> None:
    (first, line), (second, _) = pool.run(2, waits_alone, tmp_path)
    assert first == "all_reduce"
    assert line.startswith("distributed/distributed_c10d.py:")
    assert second == "", "it had been over"


def test_the_channel() -> None:
    first = SideChannel(0, 2, "127.0.0.1", None)
    second = SideChannel(1, 2, "127.0.0.1", first.port)
    assert first.told("place") == {}
    second.tell("place", {"step": 3})
    assert first.told("place") == {1: {"step": 3}}
    first.tell("place", {"step": 4})
    assert second.told("place") == {0: {"step": 4}, 1: {"step": 3}}
    assert first.verdict() is None
    assert second.declare({"kind": "stuck"}) == {"kind": "stuck"}
    assert first.declare({"kind": "lost"}) == {"kind": "stuck"}, "the first counts"


def test_the_table_is_aligned() -> None:
    place = {"step": 12, "phase": "backward", "silent": 61.4, "collective": "all_gather", "line": "a/b.py:3 f"}
    lines = place_table({10: place, 2: {**place, "collective": ""}}).splitlines()
    assert [line.index("backward") for line in lines[1:]] == [lines[0].index("phase")] * 2
    assert lines[1].split() == ["2", "12", "backward", "61", "s", "-", "a/b.py:3", "f"]


def test_silence_is_a_duration() -> None:
    with pytest.raises(ValueError, match="give seconds > 0"):
        Watchdog(silence=0)


def test_a_hang_says_where_and_ends(accidents: dict[tuple[str, int], tuple[Job, Path]]) -> None:
    job, folder = accidents["hangs", 1]
    assert job.wait() == [1, 1]
    log = job.log()
    assert re.search(r"The job ends: rank [01] has not moved for \d+ s \(step of step 3\)", log), log
    for rank in (0, 1):
        assert re.search(rf"^{rank} +3 +step +\d+ s +- +python3.11/threading.py:\d+ wait$", log, re.MULTILINE), log
    stacks = sorted((folder / "stacks").glob("*/rank-*.txt"))
    assert [file.name for file in stacks] == ["rank-00000.txt", "rank-00001.txt"]
    assert all("in on_train_batch_start" in file.read_text() for file in stacks)
    assert "The job ends" not in job.log(1), "one rank speaks for all"
