"""`Trainer.fit(model, data)`: what a user may call data, made into a data module or a loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader

from automodel_trainer.data.chat import ChatDataModule


def as_datamodule(data: Any, role: str = "train") -> tuple[pl.LightningDataModule | None, Any]:
    """A data module for data sets and paths, or the loader itself; exactly one of the two is not None (or neither).

    Args:
        data: path or Hub id, `Dataset`, `DatasetDict`, list of rows or of batches, DataLoader or other iterable, or a
            LightningDataModule.
        role: "train", "validation", "test" or "predict": what a data set without splits is used for.

    Raises:
        ValueError: something else.
    """
    if data is None or isinstance(data, pl.LightningDataModule):
        return data, None
    if isinstance(data, (list, DataLoader)) and len_or_none(data) == 0:
        raise ValueError("data is empty: there is nothing to train on.")
    rows = isinstance(data, list) and bool(data) and isinstance(data[0], dict) and "input_ids" not in data[0]
    if isinstance(data, (str, os.PathLike, Dataset, DatasetDict)) or rows:
        evaluated = {} if role == "train" else {"test" if role == "test" else "validation": data}
        return ChatDataModule(data, **evaluated), None
    if isinstance(data, list):  # Lightning would take a list for several loaders
        return None, Steps(data)
    if isinstance(data, Iterable):
        return None, data
    raise ValueError(
        f"data is a {type(data).__name__}. Allowed: a path or Hub id, a datasets.Dataset or DatasetDict, a list of "
        "rows, a DataLoader, or a LightningDataModule."
    )


def len_or_none(data: Any) -> int | None:
    """The length of whatever has one."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    """Whichever of two arguments for the same thing was given; ValueError for both."""
    if value is not None and other is not None:
        raise ValueError(f"Give {name} or {other_name}=, not both.")
    return value if value is not None else other


class Steps:
    """A list of batches as a loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def group_micro_batches(loader: DataLoader, count: int) -> DataLoader:
    """A loader like `loader` whose batches are lists of `count` of its batches: one optimizer step each.

    Raises:
        ValueError: the loader has a batch sampler of its own, which says nothing of how to group.
    """
    if loader.batch_size is None:
        raise ValueError(
            "accumulate_grad_batches > 1 needs a DataLoader with a batch_size. With a batch_sampler of your own, yield "
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
    """Collates consecutive samples into micro-batches of `size`."""

    def __init__(self, collate: Callable[[list[Any]], Any], size: int) -> None:
        self.collate, self.size = collate, size

    def __call__(self, samples: list[Any]) -> list[Any]:
        return [self.collate(samples[i : i + self.size]) for i in range(0, len(samples), self.size)]


def _iterable(loader: DataLoader) -> bool:
    return not hasattr(loader.dataset, "__getitem__")
