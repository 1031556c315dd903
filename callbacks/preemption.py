"""Preemption: on a signal or at the time limit of any rank, all ranks save a checkpoint and the run ends."""

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

from automodel_trainer._lightning import answer_requeue_signal
from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.callbacks.requeue import requeue, requeue_signal, save_for_requeue
from automodel_trainer.callbacks.time_limit import Duration, TimeLimit
from automodel_trainer.checkpoint.remote import local_root
from automodel_trainer.distributed.launch import in_notebook

TIME = "max_time"
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, try again
MARKER = "requeue"  # a file in default_root_dir that says that a run waits to be resumed


class Preemption(Callback):
    """On a signal or when time runs out, saves a checkpoint after the current step and stops the run.

    With several ranks it saves after the step that follows. Ranks agree through an all-reduce of one integer on the
    CPU, which starts after a step and is read after the next. So no step waits for the device or for another rank. The
    run does not validate again and ignores `min_steps` and `min_epochs`, because after such a signal there is little
    time left.

    A second Ctrl-C stops the process at once, wherever it is, without a save.

    In a Slurm job (`SLURMEnvironment(auto_requeue=True)`, the default under srun) the requeue signal, SIGUSR1, also
    lets Slurm queue the job again. The next start finds the checkpoint, without a `ckpt_path`, by the link
    `hpc_ckpt_1.ckpt`.

    A stopped run leaves a file `<default_root_dir>/requeue` with the reason, except after Ctrl-C. The next run removes
    it. `Trainer.exit_code` is the exit code for the scheduler.

    Args:
        signals: names of the signals. Schedulers send SIGTERM, Slurm sends SIGUSR1 with `--signal`, and Ctrl-C is
            SIGINT.
        max_time: stop after this much time since `fit` was called; `Trainer(max_time=)` sets it. A resumed run counts
            from its own beginning, like a scheduler's limit.
        reserve: how long before `max_time` to stop. None: measure it (see `TimeLimit`).

    Attributes:
        stopped_by: the name of the signal that stopped the run, or "max_time", on every rank; None if the run was not
            stopped.

    Raises:
        ValueError: a name is not a signal, a duration is not valid, or `reserve` leaves no time to train.
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
                f"Preemption(signals={list(signals)}): {unknown} do not exist on this system. Give names of signals, "
                "for example SIGTERM, SIGUSR1, SIGINT."
            )
        self.signals = tuple(signals)
        self.reserve = reserve
        self.limit = None if max_time is None else TimeLimit(max_time, reserve)
        self.stopped_by: str | None = None
        self._received = 0  # 1 + index in `reasons`; 0: nothing was received
        self._previous: dict[int, Any] = {}
        self._installed: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._flag: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._limit_val_batches: Any = None
        self._requeue_signal: str | None = None
        self._requeued = False

    def set_limit(self, max_time: Duration) -> None:
        """Set the limit from `Trainer(max_time=)`.

        Raises:
            ValueError: `max_time` is not a duration, or the callback already has a limit.
        """
        if self.limit is not None:
            raise ValueError("Give max_time to the Trainer or to Preemption, not to both.")
        self.limit = TimeLimit(max_time, self.reserve)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons to stop. If ranks have different reasons, the last one in this order counts."""
        extra = self._requeue_signal
        return (TIME, *self.signals) if extra is None or extra in self.signals else (TIME, *self.signals, extra)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock. From here on the requeue signal is remembered, until a step has ended."""
        self._received, self._requeued, self._requeue_signal = 0, False, requeue_signal(trainer)
        if self._requeue_signal is not None and stage == "fit":
            answer_requeue_signal(trainer, self._on_signal)
        if self.limit is not None:
            self.limit.start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers, and create the process group in which ranks agree."""
        self.stopped_by, self._work = None, None
        _running[:] = [self]
        if trainer.local_rank == 0:  # of every node: with a root in object storage, the marker lies on its own disk
            _marker(trainer).unlink(missing_ok=True)
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # NCCL cannot reduce tensors on the CPU
        # Lightning has just installed its own handlers. Ours replace them until the run ends.
        if threading.current_thread() is threading.main_thread():
            for name in self.reasons[1:]:
                number = getattr(signal, name)
                self._previous[number] = signal.getsignal(number)
                self._install(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if the ranks have agreed to."""
        self._check_time(trainer)
        agreed = self._agreed()
        if agreed and self.stopped_by is None:
            self.stopped_by = self.reasons[agreed - 1]
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Release the process group, and write the marker file if the run was stopped."""
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        if self.stopped_by not in (None, "SIGINT", self._requeue_signal) and trainer.local_rank == 0:
            self._leave_marker(trainer)

    def _leave_marker(self, trainer: pl.Trainer) -> None:
        _marker(trainer).parent.mkdir(parents=True, exist_ok=True)
        _marker(trainer).write_text(f"{self.stopped_by}\n")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._work = self._group = None  # do not wait: other ranks may never answer
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the signal handlers, and let Slurm queue the job again if that is why it stopped."""
        if stage == "fit" and self.stopped_by is not None and self.stopped_by == self._requeue_signal:
            if trainer.is_global_zero:  # not earlier: Slurm ends the job
                self._requeued = requeue(trainer)
            if trainer.is_global_zero and not self._requeued:
                self._leave_marker(trainer)
        # Not earlier: until Lightning removes its own handlers, they would answer a second signal with a broadcast
        # that the other ranks do not expect.
        self._restore_handlers()

    @property
    def exit_code(self) -> int:
        """The exit code for a stopped run: 75 asks the scheduler to start it again, 130 means Ctrl-C; otherwise 0.

        It is 0 if Slurm has queued the job again already.

        Under torchrun it is always 0. torchrun would take any other code for a crash, restart the run on the machine
        that it must leave, and exit with 1 itself. Use the marker file there.
        """
        if self.stopped_by is None or self._requeued or "TORCHELASTIC_RUN_ID" in os.environ:
            return 0
        return 128 + signal.SIGINT if self.stopped_by == "SIGINT" else REQUEUE

    def request(self, name: str) -> None:
        """Stop as if this process had received the signal `name`, which must be one of `signals`."""
        self._received = 1 + self.reasons.index(name)

    # --- reasons to stop on this rank -------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        self._received = 1 + self.reasons.index(name)
        if number == signal.SIGINT:
            # The default action for the second Ctrl-C does not need Python, so it also works in a step that hangs.
            self._install(number, signal.default_int_handler if in_notebook() else signal.SIG_DFL)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                # `print` is not safe in a signal handler: the signal may interrupt another `print`.
                os.write(2, b"\nCtrl-C: saving a checkpoint after this step. Press again to stop now without saving.\n")

    def _check_time(self, trainer: pl.Trainer) -> None:
        if self.limit is None:
            return
        # With async saves, the last save may have to wait for another one that is in flight.
        each = [(1 + saver.async_save, saver.longest_save) for saver in _savers(trainer)]
        saves = [times * save for times, save in each if save is not None]
        if self.limit.is_due(max(saves, default=None), looks=1 if self._group is None else 2):
            self._received = self._received or 1

    def _agreed(self) -> int:
        """The maximum of all ranks' flags after the previous step; without a process group, the current flag.

        Also starts the all-reduce that the next call reads.
        """
        if self._group is None:
            return self._received
        agreed = 0
        if self._work is not None:
            assert self._flag is not None
            self._work.wait()
            agreed = int(self._flag.item())
        # All ranks run the same steps, so they start the same number of all-reduces.
        self._flag = torch.tensor(self._received)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    # --- the stop, on every rank ------------------------------------------------------------------------------------

    def _stop(self, trainer: pl.Trainer) -> None:
        savers = _savers(trainer)
        for saver in savers:  # Lightning calls checkpoint callbacks last, so they will save this step
            saver.request_save(trainer)
        requeues = self.stopped_by == self._requeue_signal
        if requeues:
            save_for_requeue(trainer)
        what = "max_time is almost over" if self.stopped_by == TIME else f"{self.stopped_by} received"
        if savers or requeues:
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
            if signal.getsignal(number) == self._installed[number]:  # nobody else has replaced it meanwhile
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}


_running: list[Preemption] = []


def stop_running(name: str) -> None:
    """Let the run of this process stop as on the signal `name`. For launchers that cannot send signals."""
    for preemption in _running:
        if name in preemption.reasons:
            preemption.request(name)


def preemption_of(trainer: pl.Trainer) -> Preemption | None:
    """The Trainer's Preemption callback; None if it has none."""
    return next((c for c in trainer.callbacks if isinstance(c, Preemption)), None)  # type: ignore[attr-defined]


def _savers(trainer: pl.Trainer) -> list[DCPCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, DCPCheckpoint)]


def _marker(trainer: pl.Trainer) -> Path:
    return local_root(trainer.default_root_dir) / MARKER
