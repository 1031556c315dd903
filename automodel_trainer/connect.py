"""Turns the arguments of `Trainer.fit(model, data)` into a module and a data module or loader."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from automodel_trainer.data.adapt import as_datamodule, group_micro_batches
from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.modules import DEFAULT_OBJECTIVE
from automodel_trainer.modules.built import BuiltModule
from automodel_trainer.strategies import Objective

Model = str | os.PathLike[str] | PreTrainedModel | pl.LightningModule


def connect(
    model: Model, data: Any, datamodule: pl.LightningDataModule | None, role: str = "train"
) -> tuple[pl.LightningModule, pl.LightningDataModule | None, Any]:
    """The module, and a data module or loaders. Data modules prepare their tokens here, before any rank can wait.

    Args:
        model, data, datamodule: as in `Trainer.fit`.
        role: what a data set without splits is used for (`as_datamodule`).

    Returns:
        module, data module and loader; the data module or the loader is None.

    Raises:
        ValueError: both data and datamodule were given, the data is of an unknown kind, or its labels are not what this
            objective learns.
    """
    if data is not None and datamodule is not None:
        raise ValueError("Give data or datamodule=, not both.")
    module = model if isinstance(model, pl.LightningModule) else DEFAULT_OBJECTIVE(model)
    datamodule, loader = (datamodule, None) if datamodule is not None else as_datamodule(data, role)
    if isinstance(datamodule, MicroBatchDataModule):
        if isinstance(module, Objective):
            _check_labels(module, datamodule)
            if datamodule.tokenizer is None:
                datamodule.tokenizer = module.tokenizer_or_none
            elif isinstance(module, BuiltModule):
                module.adopt_tokenizer(datamodule.load_tokenizer())
        datamodule.prepare()
    return module, datamodule, loader


def _check_labels(module: Objective, datamodule: MicroBatchDataModule) -> None:
    if datamodule.labels_are_tokens and not module.labels_are_tokens:
        raise ValueError(
            f"{type(datamodule).__name__} labels every token with a token id, but {type(module).__name__} learns other "
            "labels. Give fit a DataLoader or a LightningDataModule whose micro-batches hold them."
        )


def accumulating(count: int, datamodule: pl.LightningDataModule | None, loader: Any) -> Any:
    """A loader that yields the `count` micro-batches of an optimizer step at a time.

    Args:
        count: micro-batches per optimizer step and rank.
        datamodule, loader: as `connect` returns them. This project's data modules group their batches themselves.

    Raises:
        ValueError: `count` is not 1, and the data is neither a DataLoader nor one of this project's data modules.
    """
    if count == 1 or isinstance(datamodule, MicroBatchDataModule):
        return loader
    if isinstance(loader, DataLoader):
        return group_micro_batches(loader, count)
    raise ValueError(
        f"accumulate_grad_batches={count} groups the batches of a DataLoader, or of this "
        f"project's data modules; this is a {type(datamodule or loader).__name__}. Give fit its DataLoader, or "
        "yield lists of micro-batches, one list per optimizer step, and leave accumulate_grad_batches out."
    )
