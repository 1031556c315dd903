"""Turns the arguments of `Trainer.fit(model, data)` into a module and a data module or loader."""

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
from automodel_trainer.data.chat import ChatDataModule
from automodel_trainer.data.image_text import ImageTextDataModule
from automodel_trainer.data.mixture import MixtureRows
from automodel_trainer.models.limits import is_rotary, position_limit, vocabulary_size
from automodel_trainer.modules import HuggingFaceModule, ImageTextModule, objective_named, objective_of
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
        TypeError: the model is none of these.
        ValueError: both data and datamodule were given, the data is of an unknown kind, or its labels are not what this
            objective learns.
    """
    if data is not None and datamodule is not None:
        raise ValueError("Give data or datamodule=, not both.")
    module: Any = model if isinstance(uncompiled(model), pl.LightningModule) else _objective_for(model)
    kind = module.data_class if isinstance(module, HuggingFaceModule) else ChatDataModule
    datamodule, loader = (datamodule, None) if datamodule is not None else as_datamodule(data, role, kind)
    if isinstance(module, HuggingFaceModule) and role == "train":
        check_causal(module)
    if isinstance(datamodule, MicroBatchDataModule):
        if isinstance(uncompiled(module), Objective):
            _check_labels(module, datamodule)
            share_tokenizer(module, datamodule)
        if isinstance(module, HuggingFaceModule):
            choose_rows(module, datamodule)
        datamodule.prepare()
        if isinstance(module, ImageTextModule) and role == "train" and not _has_pictures(datamodule):
            module.without_pictures()
        if isinstance(module, Objective):
            check_sizes(module, datamodule)
    return module, datamodule, loader


def share_tokenizer(module: Objective, datamodule: MicroBatchDataModule) -> None:
    """Let model and data have one tokenizer, or processor: the data's if it was given one, otherwise the model's.

    Raises:
        ValueError: there is none, or the two differ.
    """
    if isinstance(datamodule, ImageTextDataModule):
        _share_processor(module, datamodule)
    elif datamodule.tokenizer is None:
        datamodule.tokenizer = module.tokenizer_or_none
    elif isinstance(module, BuiltModule):
        module.adopt_tokenizer(datamodule.load_tokenizer())


def _share_processor(module: Objective, datamodule: ImageTextDataModule) -> None:
    """`share_tokenizer` of data with pictures.

    Raises:
        ValueError: the model reads text alone, or has no processor.
    """
    if not isinstance(module, ImageTextModule):
        raise ValueError(
            f"ImageTextDataModule gives pictures, and {type(module).__name__} trains models of text alone. Give a "
            "vision-language model (ImageTextModule), or ChatDataModule for conversations without pictures."
        )
    if datamodule.processor is None:
        datamodule.processor = module.processor
    else:
        module.adopt_processor(datamodule.load_processor())
    datamodule.load_tokenizer()
    datamodule.rope_index = module.rope_index


def _has_pictures(datamodule: MicroBatchDataModule) -> bool:
    """Whether a row that is trained on has pictures."""
    train = datamodule.rows.get("train")
    tokens = train.picture_tokens_of(0) if isinstance(train, MixtureRows) else getattr(train, "picture_tokens", None)
    return tokens is not None and bool(tokens.any())


def check_sizes(module: Objective, datamodule: MicroBatchDataModule) -> None:
    """Compare prepared data with the sizes of the model that is to be trained on it.

    Raises:
        ValueError: the data has a token or a position that the model lacks.
    """
    config = module.model_config
    if config is not None:
        vocabulary = vocabulary_size(config, getattr(module, "given_model", None))
        datamodule.check_sizes(vocabulary, position_limit(config), is_rotary(config))


def check_causal(module: HuggingFaceModule) -> None:
    """Raise ValueError if the model sees the token that it is to predict."""
    obstacle = module.isolation.causal_obstacle if module.predicts_next_token else None
    if obstacle is not None:
        raise ValueError(
            f"{type(module).__name__} trains a model to predict the next token, and this one sees it: {obstacle}. If "
            "the family can be a decoder, say so in its config (config_overrides={'is_decoder': True})."
        )


def choose_rows(module: HuggingFaceModule, datamodule: MicroBatchDataModule) -> None:
    """Let `datamodule` pack documents or pad them, as is proved of the model.

    Raises:
        ValueError: it is to do what the model cannot take.
    """
    found = module.isolation
    datamodule.choose_packing(None if found.packed is not None else found.packed_obstacle)
    if not datamodule.packs and datamodule.rows_hold_documents and found.padded_obstacle is not None:
        raise ValueError(f"This model cannot be trained on padded rows: {found.padded_obstacle}. Packing: {found}.")


def _objective_for(model: Any) -> pl.LightningModule:
    if isinstance(model, (str, os.PathLike)):
        return objective_named(model)(model)
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        return objective_of(model)(model)  # type: ignore[arg-type]
    raise TypeError(
        f"model is a {type(model).__name__}. It must be a `LightningModule`, a transformers `PreTrainedModel`, or a "
        "Hub id or folder. Write a LightningModule around a plain torch module: it says what the loss is."
    )


_Method = TypeVar("_Method", bound=Callable[..., Any])


def without(*names: str) -> Callable[[_Method], _Method]:
    """Leave keywords out of the method's signature, which is then Lightning's.

    LightningCLI makes an option of every argument that it sees, and `--data` is its data module.
    """

    def hide(method: _Method) -> _Method:
        signature = inspect.signature(method)
        seen = [parameter for parameter in signature.parameters.values() if parameter.name not in names]
        method.__signature__ = signature.replace(parameters=seen)  # type: ignore[attr-defined]
        return method

    return hide


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
