"""Hyperparameters in a checkpoint: plain data is kept, and everything else is left out with a warning."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.checkpoint.codec import encode
from automodel_trainer.nn.text import listed

KEYS = (pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)
TYPES = (pl.LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE, pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_TYPE)


def plain(value: Any) -> Any:
    """OmegaConf's containers as dicts and lists, with interpolations resolved; anything else as it is."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(value, (omegaconf.DictConfig, omegaconf.ListConfig)):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def savable(hyperparameters: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The hyperparameters that a checkpoint can hold, as plain data, and the names of the others."""
    kept, others = {}, []
    for name, value in hyperparameters.items():
        try:
            value = plain(value)
            encode(value)
        except ValueError:
            others.append(str(name))
        else:
            kept[name] = value
    return kept, others


def savable_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's state with only those hyperparameters that a checkpoint can hold. Their type is not kept."""
    return {
        key: savable(value)[0] if key in KEYS and isinstance(value, Mapping) else value
        for key, value in state.items()
        if key not in TYPES
    }


def warn_of_hyperparameters(owner: pl.LightningModule | pl.LightningDataModule) -> None:
    """Warn once, before training, of hyperparameters that checkpoints will not hold."""
    others = savable(dict(owner.hparams))[1]
    if others:
        rank_zero_warn(
            f"Checkpoints will not hold the hyperparameters {listed(others)} of {type(owner).__name__}: they are no "
            "plain data, and a checkpoint holds no pickles. load_from_checkpoint needs them as arguments. "
            f"self.save_hyperparameters(ignore={others!r}) says so yourself."
        )
