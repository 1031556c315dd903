"""Seconds that a run loses when one of two replicas is killed: replica groups beside a restart from checkpoint.

Run `python -m benchmarks.replica_kills` on two GPUs, with torchft. `groups` starts a lighthouse and two groups of one
GPU, kills the second and starts it again at once. Lost are the seconds by which the step after the kill and the step in
which the group comes back are longer than others; the return is taken apart (meeting, transfer of the state with its
rate, the first step together; and the rehearsal before that, for which nobody waits). No checkpoint is written.
`restart` (`python -m benchmarks.replica_kills restart` runs it alone, without torchft) runs the same model as one job
of torchrun, writes a checkpoint at step `--every`, kills a rank half as many steps later, and lets torchrun start both
ranks again. Lost are the seconds until the step that was under way is done, less a step. Each phase is a line of the
output with the seconds since the start. `--device cpu` tests the script itself with a small model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

Steps = Sequence[tuple[float, int, int]]
"""The time at the end of a step, its number, and the rows that this rank had in it."""
WAIT = 600  # seconds for anything to happen
TOGETHER = 8  # steps before each kill
SHAPES = {"cpu": "tiny", "cuda": "1b"}  # of the model, if none is given
ALONE = 3  # steps that the survivor makes alone at least, for the length of such a step
BEGUN = time.monotonic()


def say(text: str) -> None:
    """A line of the output, with the seconds since the start."""
    print(f"{time.monotonic() - BEGUN:6.1f} s  {text}", flush=True)


class Run:
    """A process that trains, and its diary."""

    def __init__(self, folder: Path, name: str, command: Sequence[str], device: int | None = None) -> None:
        self.file = folder / f"{name}.jsonl"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        with (folder / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def steps(self) -> Steps:
        text = self.file.read_text() if self.file.exists() else ""
        return [tuple(json.loads(line)) for line in text.split("\n")[:-1]]

    def returned(self) -> str:
        """What the newest return of a group cost, as this group sees it."""
        file = self.file.with_suffix(".returns")
        return file.read_text().splitlines()[-1] if file.exists() else "nothing"

    def pid(self, rank: int) -> int:
        return int(self.file.with_suffix(f".pid-{rank}").read_text())

    def until(self, done: Callable[[Steps], Any]) -> Steps:
        """Wait until `done(steps)`."""
        end = time.monotonic() + WAIT
        while not done(steps := self.steps()):
            if time.monotonic() > end or self.process.poll() is not None:
                log = self.file.with_suffix(".log").read_text(errors="replace")
                raise SystemExit(f"{self.file.stem} stands still:\n{log[-3000:]}")
            time.sleep(0.02)
        return steps

    def end(self) -> None:
        """Kill the process and those it started: torchrun puts each rank in a session of its own."""
        family = [self.process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def went_alone(before: int, whole: int, steps: Steps) -> bool:
    """Whether the survivor has made some steps of `whole` rows, alone, since it had made `before`."""
    return sum(rows == whole for *_, rows in steps[before:]) >= ALONE


def is_between(every: int, steps: Steps) -> bool:
    """Whether a run is about halfway between its newest checkpoint and the next one."""
    return bool(steps) and steps[-1][1] > every and every // 2 <= steps[-1][1] % every < every - 1


def began_again(before: int, steps: Steps) -> int | None:
    """The first step of a run that was started again, by its place; None: not yet. The run had made `before` then.

    A rank that lives can end a step or two after another one was killed. The number falls once they start again.
    """
    later = range(before, len(steps))
    return next((place for place in later if steps[place][1] <= steps[place - 1][1]), None)


def caught_up(before: int, steps: Steps) -> float | None:
    """When a run that was started again had made its newest step again, and the one after it; None: not yet."""
    place = began_again(before, steps)
    if place is None:
        return None
    newest = steps[place - 1][1]
    return next((when for when, number, _ in steps[place:] if number == newest + 1), None)


def typical(steps: Steps, rows: int) -> float:
    """Seconds of a step in which this rank had that many rows, as had the step before."""
    return statistics.median(b[0] - a[0] for a, b in pairwise(steps) if a[2] == b[2] == rows and b[1] == a[1] + 1)


def groups(folder: Path, options: argparse.Namespace) -> None:
    """Kill one of two replica groups, again and again."""
    os.environ.setdefault("RUST_LOG", "error")  # the lighthouse says something in every step; read at the import
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=60000, heartbeat_timeout_ms=int(options.heartbeat * 1000)
    )
    strategy = f"hsdp:fault_tolerant=true,lighthouse={server.address()},replica_timeout={options.replica_timeout}"

    def start(number: int) -> Run:
        device = number if options.device == "cuda" else None
        return Run(folder, f"group-{number}", worker(folder / f"group-{number}.jsonl", strategy, options), device)

    whole, half = options.rows, options.rows // 2
    say("groups: two groups start")
    first, second = start(0), start(1)
    lost, back = [], []
    try:
        first.until(bool)
        say("groups: the first step is done")
        for _ in range(options.kills):
            first.until(lambda steps: [rows for *_, rows in steps[-TOGETHER:]] == [half] * TOGETHER)
            second.end()
            before = len(first.steps())
            say("groups: both train; the second is killed and started again")
            second = start(1)
            steps = first.until(partial(went_alone, before, whole))
            alone = typical(steps, whole)
            gaps = [(b[0] - a[0], b[2]) for a, b in pairwise(steps[before - 1 :])]
            lost.append(max(gap for gap, rows in gaps if rows == whole) - alone)
            say(f"groups: {lost[-1]:.1f} s lost at the kill; a step takes {alone:.2f} s alone")
            steps = first.until(lambda steps: [rows for *_, rows in steps[-3:]] == [half] * 3)
            together = typical(steps, half)
            gaps = [(b[0] - a[0], b[2]) for a, b in pairwise(steps[before - 1 :])]
            back.append(max(gap for gap, rows in gaps if rows == half) - together)
            say(f"groups: {back[-1]:.1f} s lost when the group came back; a step takes {together:.2f} s together")
            say(f"groups: the group that came back: {second.returned()}")
            say(f"groups: the other: {first.returned()}")
    finally:
        first.end()
        second.end()
        server.shutdown()
    total = [a + b for a, b in zip(lost, back)]
    say(f"groups: {statistics.median(total):.1f} s lost for a kill (median of {len(total)})")


def restart(folder: Path, options: argparse.Namespace) -> None:
    """Kill one of two ranks of a job that torchrun starts again, halfway between two checkpoints."""
    file = folder / "restart.jsonl"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={options.kills}", "-m"]
    say("restart: torchrun starts two ranks")
    command = [*worker(file, "hsdp:dp_replicate=2", options, torchrun), f"--every={options.every}"]
    run = Run(folder, "restart", command)
    lost = []
    try:
        run.until(bool)
        say("restart: the first step is done")
        for _ in range(options.kills):
            steps = run.until(partial(is_between, options.every))
            before, rows = len(steps), steps[-1][2]
            os.kill(run.pid(1), signal.SIGKILL)
            say(f"restart: a rank is killed after step {steps[-1][1]}")
            steps = run.until(partial(began_again, before))
            place = began_again(before, steps)
            assert place is not None
            at, step, _ = steps[place - 1]
            say(f"restart: step {step} was done; training again, from step {steps[place][1]}")
            steps = run.until(partial(caught_up, before))
            done = caught_up(before, steps)
            assert done is not None
            lost.append(done - at - typical(steps, rows))
            say(f"restart: {lost[-1]:.1f} s lost; a step takes {typical(steps, rows):.2f} s")
    finally:
        run.end()
    say(f"restart: {statistics.median(lost):.1f} s lost for a kill (median of {len(lost)})")


def worker(file: Path, strategy: str, options: argparse.Namespace, launcher: Sequence[str] = ()) -> list[str]:
    """The command that trains."""
    given = {
        "file": file,
        "strategy": strategy,
        "device": options.device,
        "shape": options.shape or SHAPES[options.device],
    }
    given |= {"seq-len": options.seq_len, "rows": options.rows}
    flags = [f"--{name}={value}" for name, value in given.items()]
    return [sys.executable, "-m", *launcher, "benchmarks.replica_worker", *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="both", choices=["both", "groups", "restart"])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", choices=["tiny", "100m", "1b"], help="of the model; by default as the device can")
    parser.add_argument("--rows", type=int, default=8, help="of a global batch")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints of `restart`")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument(
        "--heartbeat", type=float, default=5.0, help="seconds after which the lighthouse gives a group up"
    )
    parser.add_argument("--replica-timeout", type=float, default=60.0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that what runs is ended too
    for part in ("groups", "restart") if options.part == "both" else (options.part,):
        with tempfile.TemporaryDirectory() as folder:
            {"groups": groups, "restart": restart}[part](Path(folder), options)


if __name__ == "__main__":
    main()
