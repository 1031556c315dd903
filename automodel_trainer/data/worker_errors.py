"""An error that a loader's worker finds in the data reads like one that the main process finds.

torch wraps an error of a worker into its traceback there. A ValueError is for the user, so its message is handed over
as an item, and raised where the items are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset


@dataclass(frozen=True)
class Refusal:
    """In place of an item: why there is none."""

    message: str


def telling(dataset: Dataset) -> Dataset:
    """The same data set, whose ValueErrors are items."""
    return _Stream(dataset) if isinstance(dataset, IterableDataset) else _Numbered(dataset)


def items_of(loader: Iterable[Any]) -> Iterator[Any]:
    """What a loader over a `telling` data set yields.

    Raises:
        ValueError: a worker could not make an item.
    """
    for item in loader:
        if isinstance(item, Refusal):
            raise ValueError(item.message)
        yield item


class _Numbered(Dataset):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except ValueError as error:
            return Refusal(str(error))


class _Stream(IterableDataset):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except ValueError as error:
            yield Refusal(str(error))
