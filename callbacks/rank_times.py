"""What each rank spent its time on, as lines of JSON in the run's folder, and which rank the others wait for."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from automodel_trainer.callbacks.device_probe import DeviceProbe
from automodel_trainer.callbacks.layout import sum_over_ranks
from automodel_trainer.callbacks.own_time import OwnTime
from automodel_trainer.callbacks.stragglers import Stragglers, ratios
from automodel_trainer.checkpoint.remote import local_root

GIB = 2**30
FILE = "ranks.jsonl"
NAMES = ("data_wait", "cpu", "peak_memory_gib", "own", "probe")
"""Of each rank: seconds a step that it waited for its batch, seconds a step of CPU time of its process, peak memory,
seconds a step outside of collectives, seconds that its device takes for a fixed piece of work (0 on CPU)."""
LOOKS = 200  # of `OwnTime` that a rank's own time is a mean of: 10 s


class RankTimes:
    """Measures this rank, and writes a line with the times of all. Make one on every rank: collective.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._hosts = _hosts(trainer.world_size)
        self._own, self._probe = OwnTime(), DeviceProbe(trainer.strategy.root_device)
        self._windows: deque[tuple[int, int, float, int]] = deque()  # waited, looks, seconds, steps
        self._slow, self._slow_devices = Stragglers(), Stragglers(floor=0.0)
        self._cpu = self._cpu_paused_at = 0.0
        self._opened_at = 0

    def open(self, step: int) -> None:
        """Begin a window after a step."""
        self._own.take()
        self._own.counting = True
        self._opened_at, self._cpu = step, time.process_time()

    def pause(self) -> None:
        """Something other than training begins."""
        self._own.counting, self._cpu_paused_at = False, time.process_time()

    def go_on(self) -> None:
        """Training goes on."""
        self._own.counting = True
        self._cpu += time.process_time() - self._cpu_paused_at

    def stop(self) -> None:
        """End the thread."""
        self._own.stop()

    def write(self, seconds: float, waited: float, memory: int) -> dict[str, float]:
        """Add a line with the times of every rank since `open`, and name a straggler. Collective.

        Args:
            seconds: of the window, without pauses.
            waited: seconds that this rank waited for data in them.
            memory: peak memory of this rank, in bytes.

        Returns:
            what to log.
        """
        trainer = self._trainer
        steps = trainer.global_step - self._opened_at
        self._windows.append((*self._own.take(), seconds, steps))
        cpu = (time.process_time() - self._cpu) / steps
        step, own = self._measured()
        row = (waited / steps, cpu, memory / GIB, own, self._probe.seconds())
        table = torch.zeros(trainer.world_size, len(NAMES), device=trainer.strategy.root_device)
        table[trainer.global_rank] = torch.tensor(row)
        columns = dict(zip(NAMES, sum_over_ranks(trainer, table).T.tolist()))
        if min(columns["own"]) <= 0:  # a rank that has not been looked at often enough
            columns["own"] = [0.0] * trainer.world_size
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._report(columns, step)
        return {"slowest_rank": max(ratios(columns["own"]))} if columns["own"][0] else {}

    def _measured(self) -> tuple[float, float]:
        """Seconds of a step, and those outside of collectives: means of the latest windows that have enough looks."""
        while sum(looks for _, looks, _, _ in list(self._windows)[1:]) >= LOOKS:
            self._windows.popleft()
        waited, looks, seconds, steps = (sum(column) for column in zip(*self._windows))
        step = seconds / steps
        own = max(looks - waited, 1) / max(looks, 1)  # who was seen waiting at every look does something in between
        return step, step * own if looks >= LOOKS else 0.0

    def _report(self, columns: dict[str, list[float]], step: float) -> None:
        line: dict[str, Any] = {"step": self._trainer.global_step, **columns}
        said = self._named(columns, step)
        for text in said:
            print(f"straggler: {text}", file=sys.stderr, flush=True)
        if said:
            line["said"] = said
        if named := sorted(self._slow.named | self._slow_devices.named):
            line["stragglers"] = [{"rank": rank, "host": self._hosts[rank]} for rank in named]
        folder = local_root(self._trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _named(self, columns: dict[str, list[float]], step: float) -> list[str]:
        """What is to be said of ranks that have just become stragglers."""
        own, probe = columns["own"], columns["probe"]
        said = [
            f"{self._name(rank)} takes {ratios(own)[rank]:.1f} × the median of all ranks: {own[rank]:.2f} s a step "
            f"outside of collectives, of {step:.2f} s"
            for rank in (self._slow.judge(own, step) if own[0] else [])
        ]
        said += [
            f"the device of {self._name(rank)} takes {ratios(probe)[rank]:.1f} × the median of all for the same work"
            for rank in (self._slow_devices.judge(probe, 0.0) if min(probe) > 0 else [])
        ]
        return said

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._hosts[rank]})"


def _hosts(world_size: int) -> list[str]:
    """The names of the machines of all ranks. Collective."""
    names: list[Any] = [socket.gethostname()] * world_size
    if dist.is_initialized():
        dist.all_gather_object(names, socket.gethostname())
    return names
