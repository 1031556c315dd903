"""Micro-batches: dicts of tensors made from rows of documents. ARCHITECTURE.md lists their keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from automodel_trainer.nn.constants import IGNORE_INDEX

PADDED_MULTIPLE = 8
"""The width of padded rows is a multiple of this many tokens, for the GPU's matrix units."""

MicroBatch = dict[str, Any]
"""The tensors of one forward pass on one rank; ARCHITECTURE.md lists the keys."""


class Document(NamedTuple):
    """Tokens that attend to each other and to no others.

    Attributes:
        input_ids: int array `[n]`.
        trained: bool array `[n]`: whether the token is a target of the loss. The first token never is, because no
            token precedes it.
        sample_id: row number in the data set.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    sample_id: int


Row = Sequence[Document]
"""The documents of one row. An empty row is a filler: it has no labels, so it has no weight in the loss."""


def collate_packed(rows: Sequence[Row], width: int, pad_id: int, positions: int | None = None) -> MicroBatch:
    """Lay the documents of each row end to end. `position_ids` restart at each document and at the padding.

    Args:
        rows: the documents of each row, together at most `width` tokens.
        width: tokens per row.
        pad_id: token id for padding.
        positions: how many positions the model has. Those of padding restart before that.

    Returns:
        `input_ids`, `labels` and `position_ids` (int64 `[len(rows), width]`), `lengths` (int64 `[len(rows)]`, without
        padding), `sample_ids`, `packed` and `document_lengths` (of each row, its padding the last). There is no
        attention mask: documents begin where the positions restart.
    """
    batch = _empty(rows, width, pad_id)
    lengths: list[list[int]] = []
    for index, row in enumerate(rows):
        end = 0
        for document in row:
            start, end = end, end + len(document.input_ids)
            assert end <= width, "the documents of a row are longer than the row"
            _place(batch, index, start, document)
            batch["position_ids"][index, start:end] = np.arange(end - start)
        batch["lengths"][index] = end
        limit = positions or width
        padding = width - end
        batch["position_ids"][index, end:] = np.arange(padding) % limit
        pieces = [limit] * (padding // limit) + ([rest] if (rest := padding % limit) else [])
        lengths.append([len(document.input_ids) for document in row] + pieces)
    packed = bool((batch["position_ids"] != np.arange(width)).any())
    return {**_tensors(batch, rows), "packed": packed, "document_lengths": lengths}


def collate_padded(rows: Sequence[Row], width: int, pad_id: int, positions: int | None = None) -> MicroBatch:
    """Put one document into each row. Pad its end to `width` and mask the padding.

    Args:
        rows: at most one document for each row, of at most `width` tokens.
        width: tokens per row.
        pad_id: token id for padding.
        positions: how many positions the model has. Those of padding restart before that.

    Returns:
        What `collate_packed` has without lengths, and `attention_mask` (int64 `[len(rows), width]`).
    """
    batch = _empty(rows, width, pad_id)
    batch["position_ids"][:] = np.arange(width) % (positions or width)
    batch["attention_mask"] = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        assert len(row) <= 1, "a padded row holds one document"
        for document in row:
            assert len(document.input_ids) <= width, "a document is longer than its row"
            _place(batch, index, 0, document)
            batch["attention_mask"][index, : len(document.input_ids)] = 1
            batch["lengths"][index] = len(document.input_ids)
        if not row:
            batch["attention_mask"][index, 0] = 1  # a softmax over no keys at all would be NaN
    return {**_tensors(batch, rows), "packed": False}


def padded_width(longest: int, limit: int) -> int:
    """Width of padded rows with at most `longest` tokens: rounded up to `PADDED_MULTIPLE`, but at most `limit`."""
    return min(limit, -(-max(longest, 1) // PADDED_MULTIPLE) * PADDED_MULTIPLE)


def _empty(rows: Sequence[Row], width: int, pad_id: int) -> dict[str, np.ndarray]:
    shape = (len(rows), width)
    return {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "lengths": np.zeros(len(rows), dtype=np.int64),
    }


def _place(batch: dict[str, np.ndarray], index: int, start: int, document: Document) -> None:
    end = start + len(document.input_ids)
    batch["input_ids"][index, start:end] = document.input_ids
    batch["labels"][index, start:end] = np.where(document.trained, document.input_ids, IGNORE_INDEX)
    batch["labels"][index, start] = IGNORE_INDEX  # nothing is predicted across a document boundary


def _tensors(batch: dict[str, np.ndarray], rows: Sequence[Row]) -> MicroBatch:
    tensors: MicroBatch = {key: torch.from_numpy(array) for key, array in batch.items()}
    tensors["sample_ids"] = [document.sample_id for row in rows for document in row]
    return tensors
