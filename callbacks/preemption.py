"""Stop when told to: a signal on any rank saves a checkpoint on all of them and ends the run cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint


class Preemption(Callback):
    """On a signal, save after the step that is running (on several ranks: the one after it) and stop.

    Ranks agree through an all-reduce of one number on the CPU, started after a step and looked at after the next: no
    step waits for the device or for another rank because of it. The run does not validate once more, and stops whatever
    `min_steps` and `min_epochs` say: who sends these signals will not wait long.

    Args:
        signals: names of the signals. SIGTERM is what schedulers send; SIGUSR1 what SLURM sends with `--signal`.

    Attributes:
        stopped_by: the name of the signal that ended the run, on every rank; None for a run that was not stopped.

    Raises:
        ValueError: a name that is no signal.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> None:
        unknown = [name for name in signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(
                f"Preemption(signals={list(signals)}): {unknown} is no signal here. Usual: SIGTERM, SIGUSR1."
            )
        self.signals = tuple(signals)
        self.stopped_by: str | None = None
        self._received = 0  # 1 + number of the signal in `signals`
        self._previous: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._flag: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._limit_val_batches: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stopped_by, self._received, self._work = None, 0, None
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # NCCL has no tensors on the CPU
        # Lightning has set its own handlers just before; ours take their place until the run ends.
        if threading.current_thread() is threading.main_thread():
            for name in self.signals:
                number = getattr(signal, name)
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        agreed = self._agreed()
        if agreed and self.stopped_by is None:
            self.stopped_by = self.signals[agreed - 1]
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._work = self._group = None  # other ranks may never answer
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Not earlier: until Lightning has taken its own handlers down, they would answer a second signal with a
        # broadcast that the other ranks know nothing of.
        self._restore_handlers()

    def _on_signal(self, number: int, frame: Any) -> None:
        self._received = 1 + self.signals.index(signal.Signals(number).name)

    def _agreed(self) -> int:
        """The greatest flag of all ranks as of the step before (on one rank: as of now)."""
        if self._group is None:
            return self._received
        agreed = 0
        if self._work is not None:
            assert self._flag is not None
            self._work.wait()
            agreed = int(self._flag.item())
        self._flag = torch.tensor(self._received)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def _stop(self, trainer: pl.Trainer) -> None:
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, DCPCheckpoint)]
        for saver in savers:  # Lightning calls checkpoint callbacks last, so they still see this step
            saver.request_save(trainer)
        if savers:
            rank_zero_info(f"{self.stopped_by} received: saving a checkpoint and stopping.")
        else:
            rank_zero_warn(f"{self.stopped_by} received: stopping. There is no DCPCheckpoint, so nothing is saved.")
        trainer.should_stop = True
        trainer.fit_loop.min_epochs = 0
        trainer.fit_loop.epoch_loop.min_steps = None
        self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}
