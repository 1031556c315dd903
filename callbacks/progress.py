"""ProgressLine: a live line with the progress of the run, and a summary at the end."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from automodel_trainer.callbacks.console import LiveLine, block, is_terminal
from automodel_trainer.callbacks.ledger_facts import planned_steps
from automodel_trainer.callbacks.notebook import NotebookLine, in_kernel
from automodel_trainer.callbacks.progress_text import (
    closing_rows,
    duration,
    evaluation_line,
    fitted,
    metric_texts,
    throughput_texts,
    training_loss,
)
from automodel_trainer.callbacks.throughput import Throughput

REFRESH_SECONDS = 0.2  # minimum time between two redraws of the line


class ProgressLine(ProgressBar):
    """Shows the progress of the run on rank 0:

    `step 12/40  loss 2.431  lr 3.0e-04  1,530 tok/s  sup 62%  mem 3.1 GiB  mfu 41%  0:34 left`

    In a terminal the line is redrawn in place, and all other output scrolls above it. In a file or a pipe, one line is
    printed at each log step. The values are those of the last log step, so no other step waits for the device. Each
    validation leaves a line. In a notebook the line, the loss as a curve and validation losses as dots stand below the
    cell, and are replaced in place. The run ends with a summary, which includes the validation loss before and after
    training. "Before" is Lightning's sanity check, if it covers the whole validation set (`num_sanity_val_steps=-1`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._live: LiveLine | None = None
        self._notebook: NotebookLine | None = None
        self._drawn = 0.0
        self._values: list[str] = []  # texts of the last log step
        self._step = 0
        self._planned: int | None = None
        self._first_step: tuple[int, float] | None = None  # number of this run's first step, and when it ended
        self._started = 0.0
        self._validation_losses: list[float] = []

    # --- on and off -----------------------------------------------------------------------------------------------

    @property
    def is_enabled(self) -> bool:
        """Whether anything is printed. Lightning disables it on all ranks but 0."""
        return self._enabled

    def enable(self) -> None:
        """Print from now on."""
        self._enabled = True

    def disable(self) -> None:
        """Print nothing from now on."""
        self._enabled = False
        self._close()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the live line if standard output is a terminal or a notebook."""
        super().setup(trainer, pl_module, stage)
        if self._enabled and in_kernel():
            self._notebook = NotebookLine(REFRESH_SECONDS)
        elif self._enabled and self._live is None and is_terminal():
            self._live = LiveLine()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the live line."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the live line."""
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None
        self._notebook = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the line."""
        if self._enabled:
            print(*args, **kwargs)

    def _draw(self, parts: list[str], now: bool = False) -> None:
        """Redraw the live line, but not more often than every `REFRESH_SECONDS` unless `now` is True."""
        if self._notebook is not None:
            self._notebook.draw(parts, self._step, self._planned, now)
        elif self._live is not None and (now or time.monotonic() - self._drawn > REFRESH_SECONDS):
            self._live.draw(fitted(parts, self._live.width))
            self._drawn = time.monotonic()

    # --- training -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the values of an earlier run."""
        self._validation_losses = []
        self._values = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and draw the line."""
        self._started = time.monotonic()
        self._step, self._first_step = trainer.global_step, None
        if self._enabled:
            self._planned = planned_steps(trainer)
            self._draw(self._training_line(), now=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw the line, or print one at a log step."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if not self._enabled or not stepped:
            return
        # The estimate starts after the first step, which includes compilation.
        self._first_step = self._first_step or (self._step, time.monotonic())
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        log_step = bool(every) and self._step % every == 0
        if log_step:
            self._values = self._read_values(trainer)
        self._draw(self._training_line(), now=log_step and self._notebook is None)  # a kernel is not to be flooded
        if log_step and self._live is None and self._notebook is None:
            print(fitted(self._training_line()), flush=True)

    def _read_values(self, trainer: pl.Trainer) -> list[str]:
        """Texts of the logged values. Waits for the device."""
        # Without optimizers Lightning has a stand-in, which has no groups.
        lr = next((group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups), None)
        shown = metric_texts(trainer.callback_metrics, trainer.progress_bar_metrics, lr)
        loss = training_loss(trainer.callback_metrics) if self._notebook is not None else None
        if self._notebook is not None and loss is not None:
            self._notebook.add(self._step, loss)
        throughput = _throughput(trainer)
        return shown + (throughput_texts(throughput.last) if throughput is not None else [])

    def _training_line(self) -> list[str]:
        steps = f"step {self._step}" + (f"/{self._planned}" if self._planned else "")
        left = self._seconds_left()
        return [steps, *self._values, f"{duration(left)} left" if left is not None else ""]

    def _seconds_left(self) -> float | None:
        if self._first_step is None or not self._planned or self._step <= self._first_step[0]:
            return None
        step, since = self._first_step
        return (time.monotonic() - since) / (self._step - step) * (self._planned - self._step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the summary."""
        notebook = self._notebook
        self._close()
        if not self._enabled:
            return
        throughput = _throughput(trainer)
        rows = closing_rows(
            steps=self._step,
            planned=self._planned,
            seconds=time.monotonic() - self._started,
            tokens=throughput.tokens_seen if throughput is not None else 0,
            validation_losses=self._validation_losses,
            checkpoint=str(getattr(trainer.checkpoint_callback, "last_model_path", "") or ""),
        )
        if notebook is not None:
            notebook.close(rows, block("training finished", rows))
        else:
            print(block("training finished", rows), flush=True)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the losses before training, if the sanity check covered the whole validation set."""
        if _total(trainer.num_sanity_val_batches) == _total(trainer.num_val_batches):
            self._note_validation(trainer, "validation before training")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the results of a validation during training."""
        self.reset_dataloader_idx_tracker()
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._note_validation(trainer, f"validation after step {trainer.global_step}")
            self._draw(self._training_line(), now=True)
        else:
            self._draw([""], now=True)  # clear the line: Lightning prints its table of results there

    def _note_validation(self, trainer: pl.Trainer, title: str) -> None:
        if not self._enabled:
            return
        metrics = trainer.callback_metrics
        loss = float(metrics["val_loss"]) if "val_loss" in metrics else None
        if loss is not None:
            self._validation_losses.append(loss)
        line = evaluation_line(metrics, "val_")
        if self._notebook is not None:
            self._notebook.add_validation(trainer.global_step, loss, f"{title}: {line}" if line else "")
        elif line:
            print(f"{title}: {line}", flush=True)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Note the current loader, so that the number of batches is right."""
        self.has_dataloader_changed(args[4] if len(args) > 4 else 0)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Redraw the line."""
        self._draw_evaluation("validation", args[4], self.total_val_batches_current_dataloader)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Redraw the line."""
        self._draw_evaluation("test", args[4], self.total_test_batches_current_dataloader)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Redraw the line."""
        self._draw_evaluation("predict", args[4], self.total_predict_batches_current_dataloader)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear the line."""
        self.reset_dataloader_idx_tracker()
        self._draw([""], now=True)  # Lightning prints its table of results there

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the current loader."""
        self.reset_dataloader_idx_tracker()

    def _draw_evaluation(self, name: str, batch_idx: int, total: float) -> None:
        of = f"/{int(total)}" if math.isfinite(total) else ""
        self._draw([f"{name} {batch_idx + 1}{of}"])


def _throughput(trainer: pl.Trainer) -> Throughput | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, Throughput)), None)  # type: ignore[attr-defined]


def _total(batches: Any) -> float:
    return sum(batches) if isinstance(batches, list) else batches
