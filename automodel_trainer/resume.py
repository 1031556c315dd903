"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint import check_checkpoint
from automodel_trainer.checkpoint.remote import fetch, is_remote, local_root
from automodel_trainer.checkpoint.runs import saved_in
from automodel_trainer.distributed.restarts import begin_fit


def checkpoint_path(trainer: pl.Trainer, path: str | os.PathLike[str] | None) -> str | None:
    """The folder that `path` means: "last", "best", "last-whole", "auto" (that if there is one), a folder, or a URL.

    Raises:
        ValueError: there is no checkpoint.
    """
    callback = trainer.checkpoint_callback
    if is_remote(path):
        return str(fetch(str(path), local_root(trainer.default_root_dir) / "downloads"))
    if path not in ("last", "last-whole", "best", "auto") or not isinstance(callback, DCPCheckpoint):
        return None if path is None else str(path)
    root = trainer.default_root_dir
    if path == "best":
        # This run's; in a new process what is on disk. Without a monitor the newest is the best, as in Lightning.
        in_memory = callback.best_model_path
        found = Path(in_memory) if in_memory else callback.find_best(root)
        if found is None and callback.monitor is None:
            found = callback.find_last(root)
    else:
        found = callback.find_last(root, whole=path != "last")
    if found is None and path != "auto":
        raise ValueError(
            f"ckpt_path={path!r}: there is no checkpoint under {trainer.default_root_dir}. Leave ckpt_path out to "
            "start anew (or give 'auto'), or give default_root_dir or the checkpoint's folder."
        )
    return None if found is None else str(found)


def saved_before_restart() -> str | None:
    """After a restart by torchrun: the newest whole checkpoint in the folder of the run that was restarted.

    To be called once, as `fit` begins.
    """
    run = begin_fit()
    if run is None:
        return None
    for checkpoint in reversed(saved_in(run)):
        try:
            check_checkpoint(checkpoint)
        except ValueError as error:
            rank_zero_warn(f"Passing over a damaged checkpoint: {error}")
        else:
            rank_zero_info(f"torchrun has started this run again: it goes on from {checkpoint}.")
            return str(checkpoint)
    return None
