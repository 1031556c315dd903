"""The callbacks that every Trainer has by default."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar

from automodel_trainer.callbacks.continue_run import ContinueRun
from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.callbacks.garbage_collection import GarbageCollection
from automodel_trainer.callbacks.ledger import Ledger
from automodel_trainer.callbacks.memory_budget import MemoryBudget
from automodel_trainer.callbacks.preemption import Preemption
from automodel_trainer.callbacks.progress import ProgressLine
from automodel_trainer.callbacks.ray_report import RayReport
from automodel_trainer.callbacks.throughput import Throughput
from automodel_trainer.callbacks.time_limit import Duration
from automodel_trainer.callbacks.watchdog import Watchdog


def default_callbacks(
    given: list[Callback] | Callback | None,
    *,
    checkpointing: bool,
    progress_bar: bool,
    ledger: bool,
    throughput: bool,
    watchdog: bool = False,
    garbage_collection: bool = False,
    max_time: Duration | None = None,
    folders: bool = True,
    requeues: bool = False,
    reports: bool = False,
    budget: bool = False,
) -> list[Callback]:
    """The user's callbacks, with the default ones added unless the user gave one of that kind.

    A `ContinueRun` is always among them: without it a resumed run could go on with another run's settings.

    Args:
        given: the user's callbacks.
        checkpointing: add a DCPCheckpoint and a Preemption.
        progress_bar: add a ProgressLine.
        ledger: add a Ledger.
        throughput: add a Throughput, before the callbacks that show its results.
        watchdog: add a Watchdog.
        garbage_collection: add a GarbageCollection.
        max_time: add a Preemption with this time limit.
        folders: the strategy writes checkpoint folders. Otherwise no DCPCheckpoint is added, and Lightning adds its
            ModelCheckpoint.
        reports: add a RayReport.
        budget: add a MemoryBudget, before the callbacks that watch the model's forwards.
        requeues: Slurm queues the run again on a signal: add a Preemption, which saves for it.

    Raises:
        ValueError: `max_time` is not a duration, or the user's Preemption has a limit of its own.
    """
    callbacks = [given] if isinstance(given, Callback) else list(given or [])

    def missing(kind: type[Callback]) -> bool:
        return not any(isinstance(callback, kind) for callback in callbacks)

    if missing(ContinueRun):
        callbacks.insert(0, ContinueRun())
    if throughput and missing(Throughput):
        callbacks.insert(0, Throughput())
    if budget and missing(MemoryBudget):
        callbacks.insert(0, MemoryBudget())
    if ledger and missing(Ledger):
        callbacks.append(Ledger())
    if progress_bar and missing(ProgressBar):
        callbacks.append(ProgressLine())
    if checkpointing and folders and missing(Checkpoint):
        callbacks.append(DCPCheckpoint())
    if watchdog and missing(Watchdog):
        callbacks.insert(0, Watchdog())  # first, to record the phase before another callback can hang in it
    if garbage_collection and missing(GarbageCollection):
        callbacks.append(GarbageCollection())
    if reports and missing(RayReport):
        callbacks.append(RayReport())
    if (checkpointing or requeues or max_time is not None) and missing(Preemption):
        callbacks.append(Preemption())
    if max_time is not None:
        next(callback for callback in callbacks if isinstance(callback, Preemption)).set_limit(max_time)
    return callbacks
