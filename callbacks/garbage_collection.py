"""Python's garbage collector, on a schedule."""

from __future__ import annotations

import gc
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class GarbageCollection(Callback):
    """Collects garbage every few optimizer steps, and only then.

    Left to itself Python looks for garbage whenever it thinks fit: among millions of objects of libraries and compiled
    code, which takes half a second and more, and on every rank during another step, for which the others wait. Here
    what exists after the first step is not looked at again until training ends, and what is new every few steps, on all
    ranks at the same ones.

    Source: the schedule of torchtitan (`torchtitan/tools/utils.py`), and `gc.freeze`.

    Args:
        every_n_steps: optimizer steps from one collection to the next; 0 leaves all to Python.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 0:
            raise ValueError(f"GarbageCollection(every_n_steps={every_n_steps}): give 0 (leave it to Python) or more.")
        self.every_n_steps = every_n_steps
        self._scheduled = self._frozen = False
        self._step = 0

    @property
    def active(self) -> bool:
        """Whether it collects: not where the caller has switched Python's collector off."""
        return bool(self.every_n_steps) and (self._scheduled or gc.isenabled())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self.active or step == self._step:  # no optimizer step: the batch was one of several
            return
        self._step = step
        if not self._scheduled:
            self._start(trainer)
        elif step % self.every_n_steps == 0:
            gc.collect()

    def _start(self, trainer: pl.Trainer) -> None:
        if trainer.strategy.root_device.type != "cpu":
            gc.collect()  # what is frozen is never freed, and what compilation left may hold the device's memory
        if gc.get_freeze_count() == 0:  # else the caller keeps things out of sight, and would lose that in the end
            gc.freeze()
            self._frozen = True
        gc.disable()
        self._scheduled = True

    def _stop(self) -> None:
        if self._scheduled:
            gc.enable()
            self._scheduled = False
        if self._frozen:
            gc.unfreeze()
            self._frozen = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._scheduled:
            gc.collect()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()
