"""A short hash of data that were given as objects, so that a resumed run notices others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from automodel_trainer.data.adapt import Steps
from automodel_trainer.data.sources import fingerprint
from automodel_trainer.nn.samples import sample_of, sampled

_FIRST = 16  # rows of a stream


def rows_of_loader(loaders: Any) -> str | None:
    """A hash of what loaders read; None if a data set among them is of a class of the user's own.

    Of such a data set nobody knows what reading a row does, so it is left alone, and so is a stream.
    """
    return _joined(_of_loader(loader) for loader in _each(loaders))


def rows_of_stream(sources: Iterable[Any], split: str = "train") -> str | None:
    """A hash of the first rows of the sources of a stream that are objects; None if all are paths."""
    objects = [source for source in sources if not isinstance(source, str) and not hasattr(source, "__fspath__")]
    return _joined(_of_source(source, split) for source in objects) if objects else None


def _each(loaders: Any) -> list[Any]:
    if isinstance(loaders, Mapping):
        return [loader for value in loaders.values() for loader in _each(value)]
    if isinstance(loaders, list | tuple):
        return [loader for value in loaders for loader in _each(value)]
    return [loaders]


def _of_loader(loader: Any) -> str | None:
    if isinstance(loader, Steps):
        return _of_items(loader.batches)
    return _of_dataset(loader.dataset) if isinstance(loader, DataLoader) else None


def _of_dataset(dataset: Any) -> str | None:
    """A hash of a data set whose rows lie in memory, or in Arrow files."""
    kind = type(dataset)
    if kind is Subset:
        return _joined([_of_dataset(dataset.dataset), _of_items(dataset.indices)])
    if kind is ConcatDataset:
        return _joined(map(_of_dataset, dataset.datasets))
    if kind is TensorDataset:
        return _of_items(dataset.tensors)
    if kind is Dataset:
        chosen = dataset.select(sampled(len(dataset))) if len(dataset) else dataset
        return _hash(len(dataset), fingerprint(chosen))
    if isinstance(dataset, Tensor | np.ndarray):
        return _of_items([dataset])
    return _of_items(dataset) if kind in (list, tuple) else None


def _of_source(source: Any, split: str) -> str | None:
    if isinstance(source, DatasetDict | IterableDatasetDict):
        if split not in source:
            return None  # what is given is refused elsewhere
        source = source[split]
    if isinstance(source, IterableDataset):
        return _of_items(list(islice(source, _FIRST)))
    return _of_dataset(source)


def _of_items(items: Any) -> str:
    return _hash(len(items), [_value(items[place]) for place in sampled(len(items))])


def _value(value: Any) -> Any:
    """What is hashed of a value. Of a large one samples; of an object of another class its class."""
    if isinstance(value, Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), sample_of(value)
    if isinstance(value, np.ndarray):
        flat = value.reshape(-1)
        return "array", str(value.dtype), value.shape, [_value(x) for x in flat[sampled(len(flat))].tolist()]
    if isinstance(value, Mapping):
        return sorted((str(key), _value(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return len(value), [_value(value[place]) for place in sampled(len(value))]
    return value if isinstance(value, str | bytes | int | float | None) else type(value).__name__


def _joined(parts: Iterable[str | None]) -> str | None:
    found = list(parts)
    return None if not found or None in found else found[0] if len(found) == 1 else _hash(*found)


def _hash(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]
