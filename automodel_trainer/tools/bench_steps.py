"""Time the optimizer steps of a run without device syncs."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks.counts import Counts, Totals
from automodel_trainer.callbacks.layout import dp_size, sum_over_ranks, tower_work
from automodel_trainer.nn.tower_flops import TowerWork


class BatchWatch(Callback):
    """Tells a clock when a batch arrives. It must be the first callback, while the clock is one of the last."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        """Tell the clock."""
        self.clock.batch_arrived()


class StepClock(Callback):
    """Times `steps` optimizer steps after `warmup` steps, and ends the run after `extra` more (for a profiler).

    A step lasts from the end of the previous step to its own end, so it includes loading, hooks and logging. On a GPU
    the ends are CUDA events, which do not make the host wait.

    Args:
        warmup: number of steps that do not count.
        steps: number of steps to measure.
        extra: number of further steps before the run ends.

    Attributes:
        warmup_seconds: durations of the warm-up steps.
        seconds: durations of the measured steps.
        data_seconds: total time in the measured steps that the host waited for batches.
        totals: counts of the measured steps over all ranks.
    """

    def __init__(self, warmup: int, steps: int, extra: int = 0) -> None:
        self.warmup, self.steps, self.extra = warmup, steps, extra
        self.warmup_seconds: list[float] = []
        self.seconds: list[float] = []
        self.data_seconds = 0.0
        self.totals = Totals()
        self._marks: list[Any] = []
        self._counts = Counts()
        self._tower: TowerWork | None = None
        self._batch_ended: float | None = None
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._tower = tower_work(trainer)
        self._device = trainer.strategy.root_device
        self._step = trainer.global_step
        self._mark()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Count a batch of a measured step."""
        if self._measuring:
            self._counts.add(batch)
        if self._tower is not None:
            self._tower.counting = self._measuring

    def batch_arrived(self) -> None:
        """Count the time that the host waited. Call it before any other callback sees the batch."""
        if self._measuring and self._batch_ended is not None:
            self.data_seconds += time.perf_counter() - self._batch_ended

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Mark the end of a step, and stop the run after the last one."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and len(self._marks) <= self.warmup + self.steps:
            self._mark()
        if trainer.global_step >= self.warmup + self.steps + self.extra:
            trainer.should_stop = True
        self._batch_ended = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute durations and totals. Collective."""
        seconds = self._between_marks()
        self.warmup_seconds, self.seconds = seconds[: self.warmup], seconds[self.warmup :]
        if self._tower is not None:
            self._tower.detach()
            self._counts.add_tower(self._tower.take())
        copies = trainer.world_size // dp_size(trainer)  # so many ranks see the same data, which counts once
        summed = sum_over_ranks(trainer, self._counts.tensor(self._device))
        self.totals = Totals(*(int(count) // copies for count in summed.tolist()))

    @property
    def _measuring(self) -> bool:
        return self.warmup < len(self._marks) <= self.warmup + self.steps

    def _mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def _between_marks(self) -> list[float]:
        if self._device.type != "cuda":
            return [after - before for before, after in zip(self._marks, self._marks[1:])]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1e3 for before, after in zip(self._marks, self._marks[1:])]
