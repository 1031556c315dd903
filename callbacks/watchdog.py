"""Watchdog: a run on several ranks that hangs, or loses one of them, says where and ends."""

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
from automodel_trainer.distributed.phase import current, enter_phase

_IN_STEP = ("data", "step", "forward", "backward", "clip", "optimizer")
_SHARE = 0.9  # of the time after which a collective gives up: whoever speaks later is not heard


class Watchdog(Callback):
    """Ends a run on several ranks when one does not move, raises or is gone; with one rank it does nothing.

    * A rank that stays at one place of a step for `silence`, or anywhere (loading, the first step with its compilation,
      a save, validation) for 0.9 of the time that collectives wait: a table of where every rank is, with the collective
      if it is in one, goes to stderr, the stacks of all threads of all ranks to `<default_root_dir>/stacks/`, and the
      processes end with code 1.
    * A rank that raises: the others do the same after 5 s, unless they raise, too.
    * A rank that is gone (killed, out of memory, its machine lost): the same after 20 s.

    Ranks talk through a TCPStore of their own, from a thread: it works while NCCL hangs. The thread needs Python's
    interpreter lock; a rank that holds it while it hangs counts as gone.

    Args:
        silence: seconds, or a timedelta.
    """

    def __init__(self, silence: float | timedelta = 600.0) -> None:
        self.silence = silence.total_seconds() if isinstance(silence, timedelta) else float(silence)
        if self.silence <= 0:
            raise ValueError(f"Watchdog(silence={silence!r}): give seconds > 0.")
        self._watch: Watch | None = None
        self._first_step = True
        self._elsewhere = self.silence

    @property
    def active(self) -> bool:
        """Whether a run is being watched."""
        return self._watch is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
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
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._watch is not None:
            self._watch.report("".join(traceback.format_exception(exception)))
            self._watch = None

    def _patience(self) -> float:
        return self._elsewhere if self._first_step or current.phase.partition(" ")[0] not in _IN_STEP else self.silence

    # --- where this rank is: what strategies and modules do not say themselves ---------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enter_phase("data", trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        enter_phase("step", trainer.global_step + 1)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        enter_phase("backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enter_phase("clip")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        enter_phase("optimizer")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._first_step = False
        enter_phase("data")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enter_phase("validation")

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        enter_phase("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enter_phase("data")

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        enter_phase("test")

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        enter_phase("predict")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enter_phase("end")


def _connect(trainer: pl.Trainer) -> SideChannel | None:
    """The ranks' own store. A rank that cannot have it goes unwatched: it may train well for all that. Collective."""
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
    return Path(trainer.default_root_dir) / "stacks" / name


def _kill_children(trainer: pl.Trainer) -> None:
    """Of a launch with `devices=N`, rank 0 is the parent of the others."""
    launcher: Any = trainer.strategy.launcher
    if getattr(launcher, "procs", None):
        launcher.kill(signal.SIGKILL)
