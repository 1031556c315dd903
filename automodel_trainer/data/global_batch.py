"""GlobalBatch: the rows of one optimizer step, dealt to ranks only when it is known how many take part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from automodel_trainer.data.batches import MicroBatch

T = TypeVar("T")


class GlobalBatch(list[MicroBatch]):
    """The micro-batches of this rank, which are none until `deal` is called. It may be called again.

    Args:
        build: makes the micro-batches of a rank, given its number and how many ranks there are.
    """

    def __init__(self, build: Callable[[int, int], list[MicroBatch]]) -> None:
        super().__init__()
        self._build = build

    def deal(self, rank: int, ranks: int) -> None:
        """Take the rows of one of `ranks` ranks. Each gets as many micro-batches, with fillers if need be."""
        self[:] = self._build(rank, ranks)


def whole_turns(rows: int, micro_batch_size: int, ranks: int) -> int:
    """The smallest number of rows, `rows` or more, that are whole micro-batches on every rank."""
    unit = micro_batch_size * ranks
    return -(-rows // unit) * unit
