"""Lightning's state of a run in the middle of a step, as if the step had not begun: a late group begins with it."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl

from automodel_trainer._lightning import dump_state
from automodel_trainer.checkpoint.rng import rng_state
from automodel_trainer.checkpoint.state import CONFIG_KEY, FOLDER_KEY, RNG_KEY, TOKENIZER_KEY
from automodel_trainer.data.loader import MicroBatchLoader

TAKEN_OVER = "automodel_trainer.taken_over"  # key in a loaded dict: tensors came from another group already
_LEFT_OUT = ("state_dict", "optimizer_states", CONFIG_KEY, FOLDER_KEY, TOKENIZER_KEY)


def without_tensors(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint another group needs beside weights and optimizer states."""
    return {key: value for key, value in checkpoint.items() if key not in _LEFT_OUT}


def state_before_step(trainer: pl.Trainer) -> dict[str, Any]:
    """Loops, callbacks, schedules, data module and random generators; the batch in hand counts as not taken."""
    with ExitStack() as stack:
        loader = trainer.train_dataloader
        if isinstance(loader, MicroBatchLoader):
            stack.enter_context(loader.last_not_taken())
        state = dump_state(trainer)
    for scope in ("total", "current"):
        batches = state["loops"]["fit_loop"]["epoch_loop.batch_progress"][scope]
        batches.update(ready=batches["completed"], started=batches["completed"], processed=batches["completed"])
    return deepcopy({**without_tensors(state), RNG_KEY: rng_state()})  # the run goes on while it is read


def as_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """A state from another group in the form of a loaded checkpoint."""
    return {**state, "state_dict": {}, "optimizer_states": [], TAKEN_OVER: True}


def is_over(trainer: pl.Trainer) -> bool:
    """Whether a run that has been restored has no step left."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    limits = ((trainer.max_steps, trainer.global_step), (trainer.max_epochs, epochs.processed))
    return any(limit not in (None, -1) and done >= limit for limit, done in limits)
