"""Seconds that a run loses when one of two replicas is killed: replica groups beside a restart from checkpoint.

Run `python -m benchmarks.replica_kills` on two GPUs, with torchft. `groups` starts a lighthouse and two groups of one
GPU, kills the second and starts it again at once. Lost are the seconds by which the step after the kill and the step in
which the group comes back are longer than others. `restart` runs the same model as one job of torchrun, which starts
both ranks again from the newest checkpoint. Lost are the seconds until the step that was under way is done, less a
step. The checkpoint is `--every` steps old at most, and half as old on average. Both save as often, to local disk.
`--device cpu` tests the script itself with a small model.
"""

from __future__ import annotations

import argparse
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

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from transformers import AutoConfig

SHAPES = {
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "cpu": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
Steps = Sequence[tuple[float, int, int]]
"""The time at the end of a step, its number, and the rows that this rank had in it."""
ROWS = 8  # of a global batch
WAIT = 600  # seconds for anything to happen
TOGETHER = 8  # steps before each kill
ALONE = 3  # steps that the survivor makes alone at least, for the length of such a step


class Diary(Callback):
    """The time, the step and the rows of this rank, at the end of each step; and the number of the process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_fit_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.file.with_suffix(f".pid-{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        if trainer.global_rank == 0:
            rows = sum(len(micro_batch["sample_ids"]) for micro_batch in batch)
            with self.file.open("a") as stream:
                stream.write(json.dumps([time.time(), trainer.global_step, rows]) + "\n")


def train(file: Path, strategy: str, options: argparse.Namespace) -> None:
    """Train until somebody ends this process."""
    from automodel_trainer import MockDataModule, Trainer
    from automodel_trainer.callbacks import DCPCheckpoint
    from benchmarks.random_model import RandomModel

    shape = SHAPES[options.device]
    config = AutoConfig.for_model("llama", num_key_value_heads=4, vocab_size=32000, **shape)
    data = MockDataModule(
        32000, seq_len=options.seq_len, micro_batch_size=1, global_batch_size=ROWS, num_samples=100_000
    )
    trainer = Trainer(
        accelerator=options.device,
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        precision="bf16" if options.device == "cuda" else "fp32",
        max_steps=1_000_000,
        max_epochs=-1,
        default_root_dir=file.parent,
        callbacks=[Diary(file), DCPCheckpoint(every_n_steps=options.every)],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(RandomModel(config), data, ckpt_path="auto")


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

    def pid(self, rank: int) -> int:
        return int(self.file.with_suffix(f".pid-{rank}").read_text())

    def until(self, done: Callable[[Steps], bool]) -> Steps:
        """Wait until `done(steps)`."""
        end = time.monotonic() + WAIT
        while not done(steps := self.steps()):
            if time.monotonic() > end or self.process.poll() is not None:
                log = self.file.with_suffix(".log").read_text(errors="replace")
                raise SystemExit(f"{self.file.stem} stands still:\n{log[-3000:]}")
            time.sleep(0.02)
        return steps

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def went_alone(before: int, steps: Steps) -> bool:
    """Whether the survivor has made some steps alone since it had made `before`."""
    return sum(rows == ROWS for *_, rows in steps[before:]) >= ALONE


def is_between(before: int, every: int, steps: Steps) -> bool:
    """Whether a run that goes on since `before` steps is about halfway between two checkpoints."""
    return len(steps) > before + every + TOGETHER and every // 2 <= steps[-1][1] % every < every - 1


def is_past(at: float, step: int, steps: Steps) -> bool:
    """Whether a run that was killed at a time has made the step after `step`."""
    return any(when > at and number > step for when, number, _ in steps) and len(steps) > TOGETHER


def typical(steps: Steps, rows: int) -> float:
    """Seconds of a step in which this rank had that many rows, as had the step before."""
    return statistics.median(b[0] - a[0] for a, b in pairwise(steps) if a[2] == b[2] == rows and b[1] == a[1] + 1)


def groups(folder: Path, options: argparse.Namespace) -> None:
    """Kill one of two replica groups, again and again."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=30000, heartbeat_timeout_ms=int(options.heartbeat * 1000)
    )
    strategy = f"hsdp:fault_tolerant=true,lighthouse={server.address()},replica_timeout={options.replica_timeout}"

    def start(number: int) -> Run:
        device = number if options.device == "cuda" else None
        return Run(folder, f"group-{number}", worker(folder / f"group-{number}.jsonl", strategy, options), device)

    first, second = start(0), start(1)
    lost, back = [], []
    try:
        for _ in range(options.kills):
            first.until(lambda steps: [rows for *_, rows in steps[-TOGETHER:]] == [ROWS // 2] * TOGETHER)
            second.end()
            before = len(first.steps())
            second = start(1)
            first.until(partial(went_alone, before))
            steps = first.until(lambda steps: [rows for *_, rows in steps[-3:]] == [ROWS // 2] * 3)
            alone, together = typical(steps, ROWS), typical(steps, ROWS // 2)
            gaps = [(b[0] - a[0], b[2]) for a, b in pairwise(steps[before - 1 :])]
            lost.append(max(gap for gap, rows in gaps if rows == ROWS) - alone)
            back.append(max(gap for gap, rows in gaps if rows == ROWS // 2) - together)
            print(
                f"groups: {lost[-1]:.1f} s lost at the kill, {back[-1]:.1f} s when the group came back; "
                f"a step takes {together:.2f} s together, {alone:.2f} s alone",
                flush=True,
            )
    finally:
        first.end()
        second.end()
        server.shutdown()
    total = [a + b for a, b in zip(lost, back)]
    print(f"groups: {statistics.median(total):.1f} s lost for a kill (median of {len(total)})", flush=True)


def restart(folder: Path, options: argparse.Namespace) -> None:
    """Kill one of two ranks of a job that torchrun starts again, halfway between two checkpoints."""
    file = folder / "restart.jsonl"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={options.kills}", "-m"]
    run = Run(folder, "restart", worker(file, "hsdp:dp_replicate=2", options, torchrun))
    lost = []
    try:
        for _ in range(options.kills):
            at, step, rows = run.until(partial(is_between, len(run.steps()), options.every))[-1]
            os.kill(run.pid(1), signal.SIGKILL)
            steps = run.until(partial(is_past, at, step))
            done = next(when for when, number, _ in steps if when > at and number == step + 1)
            lost.append(done - at - typical(steps, rows))
            print(f"restart: {lost[-1]:.1f} s lost; a step takes {typical(steps, rows):.2f} s", flush=True)
    finally:
        run.end()
    print(f"restart: {statistics.median(lost):.1f} s lost for a kill (median of {len(lost)})", flush=True)


def worker(file: Path, strategy: str, options: argparse.Namespace, launcher: Sequence[str] = ()) -> list[str]:
    """The command that trains."""
    given = {"device": options.device, "every": options.every, "seq-len": options.seq_len}
    flags = [f"--{name}={value}" for name, value in given.items()]
    start = ["-m", *launcher] if launcher else ["-m"]
    return [sys.executable, *start, "benchmarks.replica_kills", f"--file={file}", f"--strategy={strategy}", *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="both", choices=["both", "groups", "restart"])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--device", choices=sorted(SHAPES), default="cuda")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument(
        "--heartbeat", type=float, default=5.0, help="seconds after which the lighthouse gives a group up"
    )
    parser.add_argument("--replica-timeout", type=float, default=60.0)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file is not None:
        train(options.file, options.strategy, options)
        return
    for part in ("groups", "restart") if options.part == "both" else (options.part,):
        with tempfile.TemporaryDirectory() as folder:
            {"groups": groups, "restart": restart}[part](Path(folder), options)


if __name__ == "__main__":
    main()
