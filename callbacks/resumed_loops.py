"""Fix the state of Lightning's loops when a run resumes from a checkpoint."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from automodel_trainer.checkpoint.rng import set_rng_state


def continue_loops(trainer: pl.Trainer, rng: dict[str, Any]) -> None:
    """Make a resumed run count steps and draw random numbers like the original run.

    Args:
        trainer: a Trainer that has restored a checkpoint.
        rng: the state of the random generators in the checkpoint.
    """
    fit_loop = trainer.fit_loop
    epoch: Any = fit_loop.epoch_progress.current
    # Lightning knows that a validation is still to be done, but its counters would say so forever.
    fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()
    if epoch.ready > epoch.processed:
        # After the restore, Lightning created an iterator of the loader, which may have drawn a random number. Within
        # an epoch, the saved state is from after this draw, so set it again. Between epochs it is from before.
        set_rng_state(rng)
    else:
        # Lightning counts the epoch as finished, but it would neither count the next one nor call its hooks.
        fit_loop.reset_restart_stage()


def validates_after(trainer: pl.Trainer) -> bool:
    """Whether Lightning's schedule has a validation between this step and the next."""
    if not trainer.enable_validation or not trainer.val_check_batch:
        return False
    every = trainer.check_val_every_n_epoch
    if every is not None and (trainer.current_epoch + 1) % every != 0:
        return False
    if trainer.val_check_batch == float("inf"):
        return trainer.is_last_batch
    loop = trainer.fit_loop
    done = (loop.total_batch_idx if every is None else loop.batch_idx) + 1
    return done % trainer.val_check_batch == 0


def resume_with_validation(fit_loop: dict[str, Any]) -> None:
    """Change the saved state of the fit loop so that a resumed run begins with validation.

    The state was saved after a training batch, just before a validation. Lightning would take it for a state from after
    the validation.

    Args:
        fit_loop: the loop's state dict, changed in place.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    for scope in ("total", "current"):
        batches[scope]["completed"] = batches[scope]["ready"]
    done = validation["total"]["completed"]
    validation["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    validation["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["is_last_batch"] = False
