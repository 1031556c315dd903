"""GarbageCollection: run Python's garbage collector on a schedule."""

from __future__ import annotations

import gc
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from automodel_trainer.imports import user_freezes


class GarbageCollection(Callback):
    """Collects garbage every few optimizer steps, and at no other time.

    By default, Python decides when to collect. It scans millions of objects of libraries and compiled code, which takes
    half a second or more. Each rank does so during another step, and all other ranks wait for it. With this callback,
    objects that exist after the first step are not scanned again until training ends. New objects are scanned every few
    steps, on all ranks at the same step.

    Source: the schedule of torchtitan (`torchtitan/tools/utils.py`), and `gc.freeze`.

    Args:
        every_n_steps: optimizer steps between collections; 0 leaves garbage collection to Python.

    Raises:
        ValueError: `every_n_steps` is negative.
    """

    _frozen_by_user = False

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 0:
            raise ValueError(
                f"GarbageCollection(every_n_steps={every_n_steps}): every_n_steps must be at least 1, or 0 to leave "
                "garbage collection to Python."
            )
        self.every_n_steps = every_n_steps
        self._scheduled = self._frozen = False
        self._step = 0

    @property
    def active(self) -> bool:
        """Whether this callback collects garbage. It does not if the user has switched Python's collector off."""
        return bool(self.every_n_steps) and (self._scheduled or gc.isenabled())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the schedule after the first optimizer step, then collect every `every_n_steps` steps."""
        step = trainer.global_step
        if not self.active or step == self._step:  # no optimizer step: gradients are being accumulated
            return
        self._step = step
        if not self._scheduled:
            self._start(trainer)
        elif step % self.every_n_steps == 0:
            gc.collect()

    def _start(self, trainer: pl.Trainer) -> None:
        if trainer.strategy.root_device.type != "cpu":
            gc.collect()  # frozen garbage is never freed, and garbage of the compilation may hold device memory
        if not self._user_freezes():  # our `unfreeze` would undo that
            gc.freeze()
            self._frozen = True
        gc.disable()
        self._scheduled = True

    @classmethod
    def _user_freezes(cls) -> bool:
        """Whether anything is frozen, now or in an earlier run: to count a million objects takes a tenth of a second.

        Who has unfrozen them since is missed. Then objects are scanned that need not be.
        """
        cls._frozen_by_user = cls._frozen_by_user or user_freezes()
        return cls._frozen_by_user

    def _stop(self) -> None:
        if self._scheduled:
            gc.enable()
            self._scheduled = False
        if self._frozen:
            gc.unfreeze()
            self._frozen = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step to begin at."""
        self._step = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect the garbage of the validation."""
        if self._scheduled:
            gc.collect()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave garbage collection to Python again."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave garbage collection to Python again."""
        self._stop()
