"""Micro-batches: dicts of tensors made from rows of documents. The keys are in ARCHITECTURE.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORED = -100
"""The label of a token that is not trained."""

PADDED_MULTIPLE = 8
"""Padded rows have a multiple of this many tokens, as matrix units like it."""

MicroBatch = dict[str, Any]


class Document(NamedTuple):
    """Tokens that attend to each other and to nothing else.

    Attributes:
        input_ids: int array `[n]`.
        trained: bool array `[n]`: is the token learned (as a target). The first one never is: nothing precedes it.
        sample_id: row number of the data set it comes from.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    sample_id: int


Row = Sequence[Document]
"""The documents of one row. A row without any is a filler: it has no label and so no weight."""

Collate = Callable[[Sequence[Row], int, int], MicroBatch]


def collate_packed(rows: Sequence[Row], width: int, pad_id: int) -> MicroBatch:
    """Documents one after the other; `position_ids` restart at each, and at the padding that ends a row.

    Args:
        rows: the documents of each row, at most `width` tokens together.
        width: tokens of a row.
        pad_id: token id of the padding.

    Returns:
        `input_ids`, `labels`, `position_ids` (int64 `[len(rows), width]`), `sample_ids` and `packed`. No attention
        mask: the document boundaries are where positions restart.
    """
    batch = _empty(rows, width, pad_id)
    for index, row in enumerate(rows):
        end = 0
        for document in row:
            start, end = end, end + len(document.input_ids)
            assert end <= width, "the documents of a row are longer than the row"
            _place(batch, index, start, document)
            batch["position_ids"][index, start:end] = np.arange(end - start)
        batch["position_ids"][index, end:] = np.arange(width - end)
    return {**_tensors(batch, rows), "packed": bool((batch["position_ids"] != np.arange(width)).any())}


def collate_padded(rows: Sequence[Row], width: int, pad_id: int) -> MicroBatch:
    """One document to a row, padded at its end to `width` and masked there.

    Returns:
        As `collate_packed`, and `attention_mask` (int64 `[len(rows), width]`).
    """
    batch = _empty(rows, width, pad_id)
    batch["position_ids"][:] = np.arange(width)
    batch["attention_mask"] = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        assert len(row) <= 1, "a padded row holds one document"
        for document in row:
            assert len(document.input_ids) <= width, "a document is longer than its row"
            _place(batch, index, 0, document)
            batch["attention_mask"][index, : len(document.input_ids)] = 1
        if not row:
            batch["attention_mask"][index, 0] = 1  # a softmax over nothing at all would be NaN
    return _tensors(batch, rows)


def padded_width(longest: int, limit: int) -> int:
    """The width of padded rows of which the longest has that many tokens: rounded up, but never above `limit`."""
    return min(limit, -(-max(longest, 1) // PADDED_MULTIPLE) * PADDED_MULTIPLE)


def _empty(rows: Sequence[Row], width: int, pad_id: int) -> dict[str, np.ndarray]:
    shape = (len(rows), width)
    return {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "labels": np.full(shape, IGNORED, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
    }


def _place(batch: dict[str, np.ndarray], index: int, start: int, document: Document) -> None:
    end = start + len(document.input_ids)
    batch["input_ids"][index, start:end] = document.input_ids
    batch["labels"][index, start:end] = np.where(document.trained, document.input_ids, IGNORED)
    batch["labels"][index, start] = IGNORED  # nothing is predicted across a document boundary


def _tensors(batch: dict[str, np.ndarray], rows: Sequence[Row]) -> MicroBatch:
    tensors: MicroBatch = {key: torch.from_numpy(array) for key, array in batch.items()}
    tensors["sample_ids"] = [document.sample_id for row in rows for document in row]
    return tensors
