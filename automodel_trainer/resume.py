"""Finds the checkpoint that a run resumes from."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint import check_checkpoint
from automodel_trainer.checkpoint.remote import fetch, is_remote
from automodel_trainer.checkpoint.runs import saved_in
from automodel_trainer.distributed.restarts import begin_fit


def checkpoint_path(trainer: pl.Trainer, path: str | os.PathLike[str] | None) -> str | None:
    """The checkpoint folder that `ckpt_path` means. A URL is downloaded first.

    Args:
        trainer: its `default_root_dir` holds the runs.
        path: a folder, a URL, "last", "best", "last-whole" (the newest undamaged), or "auto" (the same, or None if
            there is none).

    Raises:
        ValueError: `path` is "last", "best" or "last-whole", and there is no such checkpoint.
    """
    callback = trainer.checkpoint_callback
    if is_remote(path):
        return str(fetch(str(path), Path(trainer.default_root_dir) / "downloads"))
    if path not in ("last", "last-whole", "best", "auto") or not isinstance(callback, DCPCheckpoint):
        return None if path is None else str(path)
    root = Path(trainer.default_root_dir)
    found = callback.find_best(root) if path == "best" else callback.find_last(root, whole=path != "last")
    if found is None and path != "auto":
        raise ValueError(
            f"ckpt_path={path!r}: there is no checkpoint under {trainer.default_root_dir}. Leave ckpt_path out to "
            "start from the beginning (or give 'auto'), or give default_root_dir or the checkpoint's folder."
        )
    return None if found is None else str(found)


def saved_before_restart() -> str | None:
    """After a restart by torchrun, the newest undamaged checkpoint of the run that was restarted; else None.

    Call it once per `fit`, at its beginning: it also notes that this process has begun a run.
    """
    run = begin_fit()
    if run is None:
        return None
    for checkpoint in reversed(saved_in(run)):
        try:
            check_checkpoint(checkpoint)
        except ValueError as error:
            rank_zero_warn(f"Skipping a damaged checkpoint: {error}")
        else:
            rank_zero_info(f"torchrun has restarted this run: it resumes from {checkpoint}.")
            return str(checkpoint)
    return None
