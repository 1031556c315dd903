"""Every use of a private Lightning name (lightning 2.6.6), so that an upgrade has one place to look at."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher, _WorkerOutput
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.argparse import _defaults_from_env_vars
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only

__all__ = [
    "DDPForwardRedirection",
    "NotebookLauncher",
    "SubprocessLauncher",
    "defaults_from_env_vars",
    "drop_advertisement",
    "install_quiet_epoch_loop",
    "keep_quiet_about_trees",
    "prepare_for_backward",
    "sync_rank_zero",
]

defaults_from_env_vars = _defaults_from_env_vars
DDPForwardRedirection = _DDPForwardRedirection
SubprocessLauncher = _SubprocessScriptLauncher


def sync_rank_zero(rank: int) -> None:
    """Tell every `rank_zero_*` helper which rank this process is."""
    for helper in (rank_zero_only, utilities_rank_zero_only, fabric_rank_zero_only):
        helper.rank = rank  # type: ignore[attr-defined]


class NotebookLauncher(_MultiProcessingLauncher):
    """Runs `fit` in forked or spawned workers. The weights stay in the checkpoint folder.

    Lightning sends the module's state dict back through pickle, which sharded tensors do not survive; the caller gets
    the checkpoint's path instead (`Trainer.fit` returns it).
    """

    @property
    def is_interactive_compatible(self) -> bool:
        return self._start_method == "fork"

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> _WorkerOutput | None:
        if self._strategy.local_rank != 0:
            return None
        extra = self.get_extra_results(trainer)
        callback = trainer.checkpoint_callback
        extra["checkpoint"] = {name: getattr(callback, name) for name in _CHECKPOINT_STATE if _settable(callback, name)}
        return _WorkerOutput(None, None, trainer.state, results, extra)

    def _recover_results_in_main_process(self, worker_output: _WorkerOutput, trainer: pl.Trainer) -> None:
        trainer.state = worker_output.trainer_state
        self.update_main_process_results(trainer, worker_output.extra)
        for name, value in worker_output.extra["checkpoint"].items():
            setattr(trainer.checkpoint_callback, name, value)


# Where a checkpoint callback, ours or Lightning's, keeps what it has written.
_CHECKPOINT_STATE = ("run_folder", "scores", "last_model_path", "best_model_path", "best_model_score")


def _settable(callback: Any, name: str) -> bool:
    return hasattr(callback, name) and not isinstance(getattr(type(callback), name, None), property)


class _QuietEpochLoop(_TrainingEpochLoop):
    """Lightning broadcasts a SIGTERM flag and waits for the device before every batch, and only rank 0 is heard.

    The `Preemption` callback agrees on a stop without waiting, whichever rank got the signal.
    """

    def _broadcast_sigterm_tensor(self) -> None:
        pass


def drop_advertisement() -> None:
    """Lightning logs a hint about a product of its makers whenever a Trainer is made."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not logger.filters:
        logger.addFilter(lambda record: "litlogger" not in record.getMessage().lower())


def keep_quiet_about_trees() -> None:
    """Lightning 2.6.6 makes a torch `LeafSpec` of every loader, which torch 2.13 wants to be asked for otherwise."""
    warnings.filterwarnings(
        "ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning, r"lightning\.pytorch\.utilities\._pytree"
    )


def install_quiet_epoch_loop(trainer: pl.Trainer) -> None:
    """Replace the training epoch loop before the first run."""
    old = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = _QuietEpochLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)
