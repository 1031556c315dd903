"""Change the saved state of Lightning's loops where a resumed run has other batches or other data."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from automodel_trainer.data.loader import MicroBatchLoader

# What counts optimizer steps. The rest of the loops' state is a place in the data.
_STEPS = ("scheduler_progress", "optimization", "epoch_loop.state_dict")


def new_data(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a run begin its first epoch, with the first row; steps, optimizer and schedule go on.

    Args:
        trainer: the Trainer, which has not restored its loops yet.
        checkpoint: what it is about to restore, changed in place.
    """
    saved = checkpoint["loops"]["fit_loop"]
    fresh = {key: value for key, value in trainer.fit_loop.state_dict().items() if key != "state_dict"}
    steps = {key: value for key, value in saved.items() if any(part in key for part in _STEPS)}
    checkpoint["loops"]["fit_loop"] = {**saved, **fresh, **steps, "state_dict": {}}
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None:
        checkpoint.pop(type(datamodule).__qualname__, None)


def place_in_epoch(checkpoint: dict[str, Any], loader: MicroBatchLoader, saved: int) -> None:
    """Count the batches of the epoch under way in this run's batch size, so that Lightning ends it with its last row.

    Args:
        checkpoint: what the Trainer is about to restore, changed in place.
        loader: a loader of this run at the checkpoint's position.
        saved: the batches of the epoch that the checkpoint counts.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    counted = progress["current"]
    if not saved or counted["ready"] != saved:
        return
    if loader.batches_yielded:
        shift = loader.batches_yielded - saved
    else:  # it stands at the next epoch; Lightning has yet to end this one, and does so if its last batch is done
        shift = loader.end - saved
        progress["is_last_batch"] = True
    for name in ("ready", "started", "processed", "completed"):
        counted[name] += shift


def place_of(checkpoint: dict[str, Any]) -> tuple[int, bool] | None:
    """How many batches of an epoch were taken, and whether loaders saved their places; None between epochs."""
    if "loops" not in checkpoint:  # a `.ckpt` that another program wrote
        return None
    saved = checkpoint["loops"]["fit_loop"]
    progress = saved["epoch_loop.batch_progress"]
    batches: int = progress["current"]["ready"]
    if not batches or progress["is_last_batch"]:
        return None
    return batches, bool(saved["state_dict"].get("combined_loader"))


def refuse_other_batches(checkpoint: dict[str, Any], folder: object) -> None:
    """Refuse another batch size of a user's own loader in the middle of an epoch: its rows cannot be told apart.

    Raises:
        ValueError: the checkpoint is in the middle of an epoch.
    """
    if place_of(checkpoint) is not None:
        raise ValueError(
            f"{folder} is in the middle of an epoch, and the batches of this run's loader have another size: which of "
            "its rows were trained cannot be told. Set the old batch size and accumulation, go on from a checkpoint at "
            "the end of an epoch, or begin the data anew with fit(resume='data')."
        )
