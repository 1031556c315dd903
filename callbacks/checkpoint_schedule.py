"""When DCPCheckpoint saves and what it keeps: its own arguments and those of Lightning's ModelCheckpoint."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from automodel_trainer.callbacks.resumed_loops import validates_after


class Schedule:
    """The arguments that say when to save and what to keep; see `DCPCheckpoint` for their meaning.

    Attributes:
        only_best: a save that is due happens only if its score is among the best (ModelCheckpoint's `save_top_k`).
        keep_last: number of newest checkpoints to keep; None keeps all.
        keep_best: number of best checkpoints to keep; None keeps all.

    Raises:
        ValueError: a value is not allowed, or two arguments say different things.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None,
        every_n_train_steps: int | None,
        every_n_epochs: int | None,
        train_time_interval: timedelta | None,
        keep_last: int | Literal["default"] | None,
        monitor: str | None,
        mode: str,
        keep_best: int | None,
        save_top_k: int | None,
        save_last: bool | Literal["link"] | None,
        save_at_end: bool | None,
        save_on_train_epoch_end: bool | None,
    ) -> None:
        steps = _one("every_n_steps", every_n_steps, "every_n_train_steps", every_n_train_steps or None)
        best = _one("keep_best", keep_best, "save_top_k", save_top_k)
        every_n_epochs = every_n_epochs or None if every_n_train_steps is not None else every_n_epochs
        if mode not in ("min", "max"):
            raise ValueError(f"DCPCheckpoint(mode={mode!r}) is unknown. Allowed: min, max.")
        if save_top_k is not None and save_top_k < -1:
            raise ValueError(
                f"DCPCheckpoint(save_top_k={save_top_k}) must be at least -1: -1 keeps all, 0 saves nothing."
            )
        if save_top_k is not None and save_top_k > 1 and monitor is None:
            raise ValueError(
                f"DCPCheckpoint(save_top_k={save_top_k}) without monitor: nothing says which are the best. Give "
                f"monitor, or keep_last={save_top_k} to keep the newest."
            )
        if save_last not in (None, True, False, "link"):
            raise ValueError(f"DCPCheckpoint(save_last={save_last!r}) is unknown. Allowed: True, False, 'link'.")
        asked = {"every_n_steps": steps, "every_n_epochs": every_n_epochs, "keep_best": keep_best}
        for name, value in {**asked, **({} if keep_last == "default" else {"keep_last": keep_last})}.items():
            if value is not None and value < 1:
                raise ValueError(f"DCPCheckpoint({name}={value}): {name} must be at least 1, or None.")
        periodic = steps is not None or every_n_epochs is not None or train_time_interval is not None
        if not periodic and monitor is None:
            every_n_epochs = 1
        self.every_n_steps, self.every_n_epochs, self.interval = steps, every_n_epochs, train_time_interval
        self.monitor, self.mode = monitor, mode
        self.save_last, self.save_top_k = save_last, best if save_top_k is None else save_top_k
        self.nothing = save_top_k == 0 and not save_last
        self.only_best = monitor is not None and save_top_k is not None and not save_last
        self.at_train_epoch_end = save_on_train_epoch_end
        self.keep_best = {None: 1, -1: None}.get(best, best)
        if keep_last == "default":  # Lightning keeps the best alone, or the newest if nothing is monitored
            keep_last = 3 if save_top_k is None else None if save_top_k == -1 and monitor is None else 1
        self.keep_last = keep_last
        if save_at_end is None:
            save_at_end = bool(save_last) or (save_last is None and save_top_k is None)
        self.save_at_end = save_at_end and not self.nothing
        self._last_step, self._last_time = 0, 0.0

    def start(self, trainer: pl.Trainer) -> None:
        """Begin a run."""
        self._last_step, self._last_time = trainer.global_step, time.monotonic()

    def is_due(self, trainer: pl.Trainer, requested: bool) -> bool:
        """Whether a save is due after this batch. Every rank must call it after every batch.

        Args:
            trainer: the Trainer.
            requested: a callback has asked for a save.
        """
        step, before = trainer.global_step, self._last_step
        self._last_step = step
        in_time = self._interval_is_over()
        if requested or in_time:
            return True
        # With several optimizers, a batch may advance the step by more than one and skip a multiple.
        if self.every_n_steps and step // self.every_n_steps > before // self.every_n_steps:
            return True
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and trainer.is_last_batch and epoch % self.every_n_epochs == 0:
            return True
        return self._is_last(trainer, epoch)

    def _is_last(self, trainer: pl.Trainer, epoch: int) -> bool:
        # Save the last step here, not in `on_train_end`: there Lightning's state says that the epoch is complete.
        step = trainer.global_step
        last_epoch = trainer.is_last_batch and epoch == trainer.max_epochs
        stops = trainer.should_stop and step >= (trainer.min_steps or 0) and not trainer.min_epochs
        return self.save_at_end and (step == trainer.max_steps or last_epoch or stops)

    def _interval_is_over(self) -> bool:
        """Rank 0's clock decides for all ranks, over their CPUs."""
        if self.interval is None:
            return False
        now = time.monotonic()
        over = torch.tensor(int(now - self._last_time >= self.interval.total_seconds()))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(over, src=0)
        if over:
            self._last_time = now
        return bool(over)

    def scores_after_validation(self, trainer: pl.Trainer) -> bool:
        """Whether the score of an epoch is read after validation; otherwise it is read at the end of the epoch."""
        if self.at_train_epoch_end is not None:
            return not self.at_train_epoch_end
        batches: Any = trainer.num_val_batches
        return bool(sum(batches) if isinstance(batches, list) else batches)

    def scores_now(self, trainer: pl.Trainer, deferred: bool) -> bool:
        """Whether a score counts at the end of this validation or epoch.

        Args:
            trainer: the Trainer.
            deferred: a save that was due waits for the score.
        """
        if not self.only_best or deferred:
            return True
        if self.every_n_steps is not None or self.interval is not None:
            return False  # only at those
        return (trainer.current_epoch + 1) % (self.every_n_epochs or 1) == 0

    def waits_for_score(self, trainer: pl.Trainer) -> bool:
        """Whether a save that is due must wait for the validation that follows, or for the first one."""
        return self.monitor not in trainer.callback_metrics or validates_after(trainer)


def _one(name: str, value: Any, other_name: str, other: Any) -> Any:
    if value is not None and other is not None and value != other:
        raise ValueError(f"DCPCheckpoint({name}={value}, {other_name}={other}): both mean the same. Give one of them.")
    return other if value is None else value
