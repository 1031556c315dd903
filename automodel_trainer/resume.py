"""Finds the checkpoint that a run resumes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer._lightning import hpc_checkpoint, last_checkpoints
from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint.manifest import only_manifest
from automodel_trainer.checkpoint.remote import fetch, is_remote, local_root
from automodel_trainer.checkpoint.runs import created, newest_whole
from automodel_trainer.checkpoint.settings import RESUME
from automodel_trainer.distributed.restarts import begin_fit, forgets_runs, launcher


def checkpoint_path(trainer: pl.Trainer, path: str | os.PathLike[str] | None) -> str | None:
    """The checkpoint folder that `ckpt_path` means. A URL is downloaded first.

    Args:
        trainer: its `default_root_dir` holds the runs.
        path: a folder, a URL, "last", "best", "last-whole" (the newest undamaged), or "auto" (the same, or None if
            there is none), or "hpc" (what a Slurm job that was queued again goes on from).

    Raises:
        ValueError: `path` is "last", "best", "last-whole" or "hpc", and there is no such checkpoint.
    """
    if path == "hpc":
        path = hpc_checkpoint(trainer)
        if path is None:
            raise ValueError(f"ckpt_path='hpc': there is no hpc_ckpt_*.ckpt in {trainer.default_root_dir}.")
    if is_remote(path):
        return str(fetch(str(path), local_root(trainer.default_root_dir) / "downloads"))
    if path not in ("last", "last-whole", "best", "auto"):
        return None if path is None else str(path)
    callbacks = trainer.checkpoint_callbacks or [DCPCheckpoint()]  # one that saves nothing; an earlier run may have
    if not any(isinstance(callback, DCPCheckpoint) for callback in callbacks):
        if path in ("last-whole", "auto"):
            raise ValueError(
                f"ckpt_path={path!r} is for checkpoints of DCPCheckpoint, and this run has a "
                f"{type(callbacks[0]).__name__}. Give 'last', 'best' or a path, or use DCPCheckpoint."
            )
        if len(callbacks) == 1 or path == "last":
            return str(path)
    root = trainer.default_root_dir
    found = _best(callbacks, root) if path == "best" else _last(trainer, callbacks, whole=path != "last")
    if found is None and path != "auto":
        raise ValueError(
            f"ckpt_path={path!r}: there is no checkpoint under {trainer.default_root_dir}. Leave ckpt_path out to "
            "start from the beginning (or give 'auto'), or give default_root_dir or the checkpoint's folder."
        )
    return None if found is None else str(found)


def _best(callbacks: Sequence[Any], root: str) -> Path | None:
    """The best checkpoint of this run; in a new process what `DCPCheckpoint` has on disk.

    A callback that monitors a metric goes before those that do not, of which the newest is the best, as in Lightning.
    """
    monitoring = [callback for callback in callbacks if getattr(callback, "monitor", None) is not None]
    chosen = monitoring or callbacks
    in_memory = next(filter(None, (getattr(callback, "best_model_path", "") for callback in chosen)), None)
    if in_memory and Path(in_memory).exists() and not only_manifest(Path(in_memory)):
        return Path(in_memory)
    ours = [callback for callback in chosen if isinstance(callback, DCPCheckpoint)]
    found = [callback.find_best(root) for callback in ours]
    found += [callback.find_last(root) for callback in ours if callback.monitor is None]
    return next(filter(None, found), None)


def _last(trainer: pl.Trainer, callbacks: Sequence[Any], whole: bool) -> Path | None:
    """The newest checkpoint of all callbacks; with `whole` the newest undamaged one of `DCPCheckpoint`."""
    root = trainer.default_root_dir
    found = [callback.find_last(root, whole) for callback in callbacks if isinstance(callback, DCPCheckpoint)]
    if not whole:
        found += [Path(path) for path in last_checkpoints(trainer)]
    there = [path for path in found if path is not None and path.exists()]
    return max(there, key=created, default=None)


def check_resume(path: str | os.PathLike[str] | None, resume: str) -> None:
    """Check the argument `resume` of `fit`.

    Raises:
        ValueError: it is unknown, or does not go together with `ckpt_path`.
    """
    if resume not in RESUME:
        raise ValueError(f"resume={resume!r} is unknown. Allowed: {', '.join(map(repr, RESUME))}.")
    if resume != "all" and path is None:
        raise ValueError(
            f"resume={resume!r} says what to take from a checkpoint, and there is none: give ckpt_path (a folder, "
            "'last' or 'best')."
        )
    if resume == "weights" and path == "auto":
        raise ValueError(
            "ckpt_path='auto' goes on after an interruption, and resume='weights' would lose the optimizer each time. "
            "Name the checkpoint's folder, or leave resume out."
        )


def check_folder(path: str, resume: str) -> None:
    """Check that `resume` can be asked of a checkpoint.

    Raises:
        ValueError: it is no checkpoint folder of this project.
    """
    if not (Path(path) / "trainer.json").is_file():
        raise ValueError(
            f"resume={resume!r} needs a checkpoint folder of this project, such as checkpoints/step-00000100, and "
            f"{path} is none. For the weights of a Hugging Face folder give it as the model."
        )


def saved_before_restart(trainer: pl.Trainer, ckpt_path: str | os.PathLike[str] | None = None) -> str | None:
    """After a restart by torchrun or Ray, the newest undamaged checkpoint of the run that was restarted; else None.

    Call it once per `fit`, at its beginning: it also notes that this process has begun a run.

    Args:
        trainer: its callbacks know where the run was saved.
        ckpt_path: what the user gave; without it, a run that nobody remembers would silently start anew.
    """
    run = begin_fit()
    if run is None:
        if ckpt_path is None and forgets_runs():
            rank_zero_warn(
                "torchrun has restarted this run, and it starts from the beginning: with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 nobody knows which run it was. Give ckpt_path='auto'."
            )
        return None
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, DCPCheckpoint)]
    found = [saver.find_last_of(run, trainer.default_root_dir) for saver in savers] or [newest_whole(run)]
    checkpoint = max(filter(None, found), key=created, default=None)
    if checkpoint is None:
        return None
    rank_zero_info(f"{launcher()} has restarted this run: it resumes from {checkpoint}.")
    return str(checkpoint)


def requeued_checkpoint(trainer: pl.Trainer, path: str | os.PathLike[str] | None) -> str | None:
    """In a Slurm job without a `ckpt_path`, the checkpoint of the run that was queued again; else None.

    Where `hpc_ckpt_*` is a link into the folder of a run, it is the newest undamaged checkpoint of that run, which may
    have gone on since.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if path is not None or not (isinstance(environment, SLURMEnvironment) or SLURMEnvironment.detect()):
        return None
    found = hpc_checkpoint(trainer)
    if found is None:
        return None
    whole = newest_whole(Path(found).resolve().parent) if os.path.islink(found) else Path(found)
    if whole is None:
        raise ValueError(
            f"{found} says that this run was queued again, and its checkpoints are gone. Remove the link to start from "
            "the beginning, or give ckpt_path."
        )
    rank_zero_info(f"Slurm has started this run again: it resumes from {whole}. For a new run remove {found}.")
    return str(whole) if os.path.islink(found) else found
