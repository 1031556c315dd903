"""Stop when told to: a signal or the time limit on any rank saves a checkpoint on all of them and ends the run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.callbacks.time_limit import Duration, TimeLimit
from automodel_trainer.distributed.launch import in_notebook

TIME = "max_time"
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, try again
MARKER = "requeue"  # in default_root_dir while a run waits to be gone on with


class Preemption(Callback):
    """On a signal, or when time runs out, save after the running step (on several ranks: the one after it) and stop.

    Ranks agree through an all-reduce of one number on the CPU, started after a step and looked at after the next: no
    step waits for the device or for another rank because of it. The run does not validate once more, and stops whatever
    `min_steps` and `min_epochs` say: who sends these signals will not wait long.

    A second Ctrl-C stops at once, without a save, wherever the process is.

    A run that was stopped so leaves `<default_root_dir>/requeue` with the reason, unless it was Ctrl-C; the next one
    removes it. `Trainer.exit_code` is what to tell a scheduler.

    Args:
        signals: names of the signals. SIGTERM is what schedulers send; SIGUSR1 what Slurm sends with `--signal`; SIGINT
            is Ctrl-C.
        max_time: stop when this much time has passed since `fit` was called; `Trainer(max_time=)` sets it. A resumed
            run counts from its own beginning, as a scheduler's limit does.
        reserve: how long before that; None measures (see `TimeLimit`).

    Attributes:
        stopped_by: the name of the signal that ended the run, or "max_time", on every rank; None for a run that was not
            stopped.

    Raises:
        ValueError: a name that is no signal, a duration that is none, or a reserve that leaves no time.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGINT"),
        max_time: Duration | None = None,
        reserve: Duration | None = None,
    ) -> None:
        unknown = [name for name in signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(
                f"Preemption(signals={list(signals)}): {unknown} is no signal here. Usual: SIGTERM, SIGUSR1, SIGINT."
            )
        self.signals = tuple(signals)
        self.reserve = reserve
        self.limit = None if max_time is None else TimeLimit(max_time, reserve)
        self.stopped_by: str | None = None
        self._received = 0  # 1 + place in `reasons`
        self._previous: dict[int, Any] = {}
        self._installed: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._flag: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._limit_val_batches: Any = None

    def set_limit(self, max_time: Duration) -> None:
        """What `Trainer(max_time=)` asks for.

        Raises:
            ValueError: no duration, or the callback has another limit of its own.
        """
        if self.limit is not None:
            raise ValueError("Give max_time to the Trainer or to Preemption, not to both.")
        self.limit = TimeLimit(max_time, self.reserve)

    @property
    def reasons(self) -> tuple[str, ...]:
        """What a run can be stopped by; of several at a time the last counts."""
        return (TIME, *self.signals)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.limit is not None:
            self.limit.start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stopped_by, self._received, self._work = None, 0, None
        if trainer.is_global_zero:
            _marker(trainer).unlink(missing_ok=True)
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # NCCL has no tensors on the CPU
        # Lightning has set its own handlers just before; ours take their place until the run ends.
        if threading.current_thread() is threading.main_thread():
            for name in self.signals:
                number = getattr(signal, name)
                self._previous[number] = signal.getsignal(number)
                self._install(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look_at_the_clock(trainer)
        agreed = self._agreed()
        if agreed and self.stopped_by is None:
            self.stopped_by = self.reasons[agreed - 1]
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
        if self.stopped_by not in (None, "SIGINT") and trainer.is_global_zero:
            _marker(trainer).parent.mkdir(parents=True, exist_ok=True)
            _marker(trainer).write_text(f"{self.stopped_by}\n")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._work = self._group = None  # other ranks may never answer
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Not earlier: until Lightning has taken its own handlers down, they would answer a second signal with a
        # broadcast that the other ranks know nothing of.
        self._restore_handlers()

    @property
    def exit_code(self) -> int:
        """What a process that was stopped should end with: 75 asks to be started again, 130 is the user's own Ctrl-C.

        0 under torchrun, which would take any other code for a crash, start the run again on the machine that it has to
        leave, and end with 1 itself: there the marker file tells.
        """
        if self.stopped_by is None or "TORCHELASTIC_RUN_ID" in os.environ:
            return 0
        return 128 + signal.SIGINT if self.stopped_by == "SIGINT" else REQUEUE

    # --- what happened on this rank ---------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        self._received = 1 + self.reasons.index(name)
        if number == signal.SIGINT:
            # The system's own answer to the second one needs no Python: it works in a step that hangs, too.
            self._install(number, signal.default_int_handler if in_notebook() else signal.SIG_DFL)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, b"\nCtrl-C: saving a checkpoint after this step. Once more stops now, without one.\n")

    def _look_at_the_clock(self, trainer: pl.Trainer) -> None:
        if self.limit is None:
            return
        # With saves in the background the last one may have to wait for another.
        each = [(1 + saver.async_save, saver.longest_save) for saver in _savers(trainer)]
        saves = [times * save for times, save in each if save is not None]
        if self.limit.is_due(max(saves, default=None), looks=1 if self._group is None else 2):
            self._received = self._received or 1

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

    # --- what is done about it, on every rank -----------------------------------------------------------------------

    def _stop(self, trainer: pl.Trainer) -> None:
        savers = _savers(trainer)
        for saver in savers:  # Lightning calls checkpoint callbacks last, so they still see this step
            saver.request_save(trainer)
        what = "max_time is about to be reached" if self.stopped_by == TIME else f"{self.stopped_by} received"
        if savers:
            rank_zero_info(f"{what}: saving a checkpoint and stopping.")
        else:
            rank_zero_warn(f"{what}: stopping. There is no DCPCheckpoint, so nothing is saved.")
        trainer.should_stop = True
        trainer.fit_loop.min_epochs = 0
        trainer.fit_loop.epoch_loop.min_steps = None
        self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def _install(self, number: int, handler: Any) -> None:
        signal.signal(number, handler)
        self._installed[number] = handler

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._installed[number]:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}


def preemption_of(trainer: pl.Trainer) -> Preemption | None:
    """The Trainer's Preemption callback, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, Preemption)), None)  # type: ignore[attr-defined]


def _savers(trainer: pl.Trainer) -> list[DCPCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, DCPCheckpoint)]


def _marker(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / MARKER
