"""What Lightning's loops do not see to by themselves when a run goes on from a checkpoint."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from automodel_trainer.checkpoint.rng import set_rng_state


def go_on(trainer: pl.Trainer, rng: dict[str, Any]) -> None:
    """Make a resumed run count and draw random numbers as the first run did, where Lightning does not see to it."""
    fit_loop = trainer.fit_loop
    epoch: Any = fit_loop.epoch_progress.current
    # Lightning has taken note of a validation that is still to be done; its counters would say so ever after.
    fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()
    if epoch.ready > epoch.processed:
        # It has made an iterator of the loader after it restored, and an iterator may draw a random number. In an
        # epoch that is not over the saved state is from after that draw, between epochs from before it.
        set_rng_state(rng)
    else:
        # It has counted the epoch as over, but would not count the next one as begun, nor call its hooks.
        fit_loop.reset_restart_stage()


def validates_after(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates between this step and the next by its schedule of batches and epochs."""
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
    """Make the state one from the beginning of validation: a resumed run then does it.

    Lightning would take a state from the end of a training batch, with validation about to follow, as one in which it
    has been done.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    for scope in ("total", "current"):
        batches[scope]["completed"] = batches[scope]["ready"]
    done = validation["total"]["completed"]
    validation["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    validation["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["is_last_batch"] = False
