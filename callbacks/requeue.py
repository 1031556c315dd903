"""Slurm's requeue: a run that the requeue signal stops is queued again, and goes on when it starts."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer._lightning import next_hpc_checkpoint
from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint.remote import is_remote


def requeue_signal(trainer: pl.Trainer) -> str | None:
    """The name of the signal on which this run is to be queued again; None if it is not."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return None if environment.requeue_signal is None else environment.requeue_signal.name


def asks_for_requeue(plugins: Any) -> bool:
    """Whether `Trainer(plugins=)`, or the environment of this process, lets Slurm queue the run again."""
    given = plugins if isinstance(plugins, (list, tuple)) else [plugins]
    chosen = [plugin for plugin in given if isinstance(plugin, SLURMEnvironment)]
    return any(plugin.auto_requeue for plugin in chosen) if chosen else SLURMEnvironment.detect()


def save_for_requeue(trainer: pl.Trainer) -> None:
    """Write `<default_root_dir>/hpc_ckpt_1.ckpt`, as Lightning does, if no callback saves what can be linked.

    Collective.
    """
    if not _linkable(trainer):
        trainer.save_checkpoint(trainer.strategy.broadcast(next_hpc_checkpoint(trainer)))


def requeue(trainer: pl.Trainer) -> bool:
    """Let the next start find the newest checkpoint, and ask Slurm to queue this job again. Rank 0 calls it.

    Returns:
        whether Slurm took it.
    """
    savers = _linkable(trainer)
    if savers:
        saved = [Path(saver.last_model_path) for saver in savers if saver.last_model_path]
        if not saved:
            rank_zero_warn("No checkpoint could be written, so the job is not queued again: it would begin anew.")
            return False
        _link(next_hpc_checkpoint(trainer), saved[-1])
    for logger in trainer.loggers:
        logger.finalize("finished")
    return _scontrol(_job_id())


def _link(link: str, checkpoint: Path) -> None:
    folder = Path(link).parent
    folder.mkdir(parents=True, exist_ok=True)
    Path(link).symlink_to(os.path.relpath(checkpoint.resolve(), folder.resolve()))


def _linkable(trainer: pl.Trainer) -> list[DCPCheckpoint]:
    """Callbacks whose checkpoints a run can go on from, and a link can point to."""
    if is_remote(trainer.default_root_dir):
        return []
    ours = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, DCPCheckpoint)]
    return [callback for callback in ours if not callback.save_weights_only]


def _job_id() -> str:
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return os.environ.get("SLURM_JOB_ID", "")


def _scontrol(job: str) -> bool:
    if not re.fullmatch(r"\d+(_\d+)?", job):
        rank_zero_warn(f"The job is not queued again: SLURM_JOB_ID={job!r} is no number of a job.")
        return False
    try:
        code = subprocess.call(["scontrol", "requeue", job])
    except OSError as error:
        rank_zero_warn(f"The job is not queued again: scontrol cannot be run ({error}). Run: scontrol requeue {job}")
        return False
    if code:
        rank_zero_warn(f"The job is not queued again: scontrol requeue {job} ended with code {code}.")
    else:
        rank_zero_info(f"Slurm queues job {job} again. It goes on from the checkpoint.")
    return code == 0
