"""`Trainer.fit(model, data)`: turn whatever the user passes as data into a data module or a loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.utils.data import DataLoader

from automodel_trainer.data.chat import ChatDataModule


def as_datamodule(
    data: Any, role: str = "train", kind: Callable[..., pl.LightningDataModule] = ChatDataModule
) -> tuple[pl.LightningDataModule | None, Any]:
    """Make a data module from data sets and paths; pass loaders through.

    Args:
        data: a path or Hub id, a `Dataset` or `DatasetDict`, a list of rows, of batches or of loaders, a DataLoader or
            another iterable, or a LightningDataModule.
        role: "train", "validation", "test" or "predict": what to use a data set without splits for.
        kind: the data module of data sets and paths.

    Returns:
        (data module, None) or (None, loader). Both are None if `data` is None.

    Raises:
        ValueError: `data` is empty, or none of these.
    """
    if data is None or isinstance(data, pl.LightningDataModule):
        return data, None
    if isinstance(data, (list, DataLoader)) and len_or_none(data) == 0:
        raise ValueError("data is empty: there is nothing to train on. Give at least one row or batch.")
    rows = isinstance(data, list) and bool(data) and isinstance(data[0], dict) and "input_ids" not in data[0]
    if isinstance(data, (str, os.PathLike, Dataset, DatasetDict)) or rows:
        evaluated = {} if role == "train" else {"test" if role == "test" else "validation": data}
        return kind(data, **evaluated), None
    if isinstance(data, list):
        return None, as_loaders(data)
    if isinstance(data, Iterable):
        return None, data
    raise ValueError(
        f"data is a {type(data).__name__}. Allowed: a path or Hub id, a datasets.Dataset or DatasetDict, a list of "
        "rows, a DataLoader, or a LightningDataModule."
    )


def len_or_none(data: Any) -> int | None:
    """`len(data)`, or None if `data` has no length."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The one of two arguments that was given; None if neither was.

    Raises:
        ValueError: both were given.
    """
    if value is not None and other is not None:
        raise ValueError(f"Give {name} or {other_name}=, not both.")
    return value if value is not None else other


def as_loaders(data: Any) -> Any:
    """What Lightning takes as loaders: a list of batches becomes one loader, and a list of loaders stays one."""
    return Steps(data) if isinstance(data, list) and not any(map(_holds_loader, data)) else data


def _holds_loader(item: Any) -> bool:
    """Whether an item of a list is a loader, or a collection of some: an iterable that is not itself data."""
    if isinstance(item, (list, tuple)):
        return any(map(_holds_loader, item))
    if isinstance(item, Mapping):
        return any(map(_holds_loader, item.values()))
    return isinstance(item, Iterable) and not isinstance(item, (str, bytes, Tensor, np.ndarray))


class Steps:
    """A loader over a list of batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.numbers: Iterable[int] = range(len(batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[number] for number in self.numbers)


def group_micro_batches(loader: DataLoader, count: int) -> DataLoader:
    """A loader that yields lists of `count` batches of `loader`: the micro-batches of one optimizer step.

    Raises:
        ValueError: the loader has a custom batch sampler, so we do not know how to group its batches.
    """
    if loader.batch_size is None:
        raise ValueError(
            "accumulate_grad_batches > 1 needs a DataLoader with a batch_size. With a custom batch_sampler, yield "
            "lists of micro-batches, or use ChatDataModule(global_batch_size=…)."
        )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size * count,
        sampler=None if _iterable(loader) else loader.sampler,
        collate_fn=_Chunked(loader.collate_fn, loader.batch_size),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
    )


class _Chunked:
    """Collates consecutive samples into micro-batches of `size` samples."""

    def __init__(self, collate: Callable[[list[Any]], Any], size: int) -> None:
        self.collate, self.size = collate, size

    def __call__(self, samples: list[Any]) -> list[Any]:
        return [self.collate(samples[i : i + self.size]) for i in range(0, len(samples), self.size)]


def _iterable(loader: DataLoader) -> bool:
    return not hasattr(loader.dataset, "__getitem__")
