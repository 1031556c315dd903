"""Watchdog: end a run on several ranks if one of them hangs or disappears, and report where."""

from __future__ import annotations

import signal
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks.side_channel import SideChannel
from automodel_trainer.callbacks.watch import Watch
from automodel_trainer.checkpoint.remote import local_root
from automodel_trainer.distributed.phase import current, enter_phase

_IN_STEP = ("data", "step", "forward", "backward", "clip", "optimizer")
_SHARE = 0.9  # of the collectives' timeout: after the full timeout, torch would end the process first


class Watchdog(Callback):
    """Ends a run on several ranks if one of them hangs, raises or disappears. With one rank it does nothing.

    * A rank hangs if it stays in one phase of a step for `silence`, or in any other phase (loading, the first step with
      its compilation, a save, validation) for 0.9 of the collectives' timeout. The job then ends: a table with the
      phase of every rank, and its collective if it is in one, is printed to stderr. The stacks of all threads of all
      ranks are written to `<default_root_dir>/stacks/`. The processes end with exit code 1.
    * If a rank raises, the job ends in the same way after 5 s, unless the other ranks raise, too.
    * If a rank disappears (killed, out of memory, machine lost), the job ends in the same way after 20 s.

    Ranks communicate in a thread, through a separate TCPStore, which works even if NCCL hangs. The thread needs the
    GIL, so a rank that hangs while it holds the GIL counts as gone.

    Args:
        silence: how long a rank may stay in one phase of a step: seconds, or a timedelta.

    Raises:
        ValueError: `silence` is not positive.
    """

    def __init__(self, silence: float | timedelta = 600.0) -> None:
        self.silence = silence.total_seconds() if isinstance(silence, timedelta) else float(silence)
        if self.silence <= 0:
            raise ValueError(f"Watchdog(silence={silence!r}): give seconds > 0. To switch it off, omit the callback.")
        self._watch: Watch | None = None
        self._first_step = True
        self._elsewhere = self.silence

    @property
    def active(self) -> bool:
        """Whether a run is being watched."""
        return self._watch is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect to the other ranks and start the thread. Collective."""
        if trainer.world_size == 1 or self._watch is not None:
            return
        enter_phase("build", 0)
        self._first_step = True
        timeout: Any = getattr(trainer.strategy, "timeout", None)
        waits = timeout.total_seconds() if isinstance(timeout, timedelta) else 600.0
        self._elsewhere = max(self.silence, _SHARE * waits)
        channel, folder = _connect(trainer), _folder(trainer)
        if channel is not None:
            self._watch = Watch(channel, self._patience, folder, lambda: _kill_children(trainer))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop the thread."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Report the exception to the other ranks, and stop the thread."""
        if self._watch is not None:
            self._watch.report("".join(traceback.format_exception(exception)))
            self._watch = None

    def _patience(self) -> float:
        return self._elsewhere if self._first_step or current.phase.partition(" ")[0] not in _IN_STEP else self.silence

    # --- phases that strategies and modules do not announce themselves -----------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase `data`."""
        enter_phase("data", trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enter the phase `step` of a new step."""
        enter_phase("step", trainer.global_step + 1)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """Enter the phase `backward`."""
        enter_phase("backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase `clip`."""
        enter_phase("clip")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Enter the phase `optimizer`."""
        enter_phase("optimizer")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Enter the phase `data`."""
        self._first_step = False
        enter_phase("data")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase `validation`."""
        enter_phase("validation")

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Enter the phase `validation` again, which restarts its clock."""
        enter_phase("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase `data`."""
        enter_phase("data")

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Enter the phase `test` again, which restarts its clock."""
        enter_phase("test")

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Enter the phase `predict` again, which restarts its clock."""
        enter_phase("predict")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase `end`."""
        enter_phase("end")


def _connect(trainer: pl.Trainer) -> SideChannel | None:
    """Connect to the ranks' own store. Collective.

    A rank that cannot connect is not watched, with a warning: training may work all the same.
    """
    rank, size = trainer.global_rank, trainer.world_size
    host = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
    channel, problem = None, ""
    try:
        channel = SideChannel(rank, size, host, None) if rank == 0 else None
    except SideChannel.LOST as error:
        problem = str(error)
    port, problem = trainer.strategy.broadcast((None if channel is None else channel.port, problem))
    try:
        if channel is None and port is not None:
            channel = SideChannel(rank, size, host, port)
    except SideChannel.LOST as error:
        problem = str(error)
    if channel is None:
        warnings.warn(
            f"Rank {rank} is not watched for hangs: no connection to a store of rank 0 ({problem}).", stacklevel=2
        )
    return channel


def _folder(trainer: pl.Trainer) -> Path:
    name = trainer.strategy.broadcast(time.strftime("%Y%m%d-%H%M%S"))
    return local_root(trainer.default_root_dir) / "stacks" / name


def _kill_children(trainer: pl.Trainer) -> None:
    """Kill the ranks that this process has started: with `devices=N`, rank 0 is the parent of the others."""
    launcher: Any = trainer.strategy.launcher
    if getattr(launcher, "procs", None):
        launcher.kill(signal.SIGKILL)
