"""What `Trainer.fit(model, data)` is given, made into a module and a data module or loader."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from automodel_trainer._lightning import uncompiled
from automodel_trainer.data.adapt import as_datamodule, group_micro_batches
from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.modules import DEFAULT_OBJECTIVE
from automodel_trainer.strategies import Objective

Model = str | os.PathLike[str] | PreTrainedModel | pl.LightningModule


def connect(
    model: Model, data: Any, datamodule: pl.LightningDataModule | None, role: str = "train"
) -> tuple[pl.LightningModule, pl.LightningDataModule | None, Any]:
    """The module, and a data module or loaders; tokens are prepared before any process waits for another.

    Args:
        model, data, datamodule: as `Trainer.fit` has them.
        role: what a data set without splits is used for (`as_datamodule`).

    Raises:
        TypeError: the model is none of these.
        ValueError: two kinds of data, or one that nothing can be made of, or that has no labels for this objective.
    """
    if data is not None and datamodule is not None:
        raise ValueError("Give data or datamodule=, not both.")
    module: Any = model if isinstance(uncompiled(model), pl.LightningModule) else _objective_for(model)
    datamodule, loader = (datamodule, None) if datamodule is not None else as_datamodule(data, role)
    if isinstance(datamodule, MicroBatchDataModule):
        if isinstance(uncompiled(module), Objective):
            _check_labels(module, datamodule)
            if datamodule.tokenizer is None:
                datamodule.tokenizer = module.tokenizer_or_none
        datamodule.prepare()
    return module, datamodule, loader


def _objective_for(model: Any) -> pl.LightningModule:
    named = isinstance(model, (str, os.PathLike))
    if named or (isinstance(model, nn.Module) and hasattr(model, "config")):
        return DEFAULT_OBJECTIVE(model)
    raise TypeError(
        f"model is a {type(model).__name__}. It must be a `LightningModule`, a transformers `PreTrainedModel`, or a "
        "Hub id or folder. Write a LightningModule around a plain torch module: it says what the loss is."
    )


_Method = TypeVar("_Method", bound=Callable[..., Any])


def with_alias(name: str) -> Callable[[_Method], _Method]:
    """Leave the keyword `name` out of the method's signature: it is a second name of another argument.

    LightningCLI makes an option of every argument that it sees, and `--data` is its data module.
    """

    def hide(method: _Method) -> _Method:
        signature = inspect.signature(method)
        seen = [parameter for parameter in signature.parameters.values() if parameter.name != name]
        method.__signature__ = signature.replace(parameters=seen)  # type: ignore[attr-defined]
        return method

    return hide


def _check_labels(module: Objective, datamodule: MicroBatchDataModule) -> None:
    if datamodule.labels_are_tokens and not module.labels_are_tokens:
        raise ValueError(
            f"{type(datamodule).__name__} labels every token with a token id, and {type(module).__name__} learns other "
            "labels. Give fit a DataLoader or a LightningDataModule whose micro-batches hold its labels."
        )


def accumulating(count: int, datamodule: pl.LightningDataModule | None, loader: Any) -> Any:
    """`loader`, made to give the `count` micro-batches of an optimizer step at a time.

    Raises:
        ValueError: nobody knows how to group these batches.
    """
    if count == 1 or isinstance(datamodule, MicroBatchDataModule):
        return loader
    if isinstance(loader, DataLoader):
        return group_micro_batches(loader, count)
    raise ValueError(
        f"accumulate_grad_batches={count} groups the batches of a DataLoader, or of this "
        f"project's data modules; this is a {type(datamodule or loader).__name__}. Give fit its DataLoader, or "
        "yield lists of micro-batches, one list for an optimizer step, and leave accumulate_grad_batches out."
    )
