"""Micro-batches with pictures: what the processor makes of real pictures, laid into packed or padded rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automodel_trainer.data.batches import MicroBatch, collate_packed, collate_padded
from automodel_trainer.data.pictures.encode import PictureEncoder
from automodel_trainer.data.pictures.store import PictureDocument

_OWN = ("input_ids", "attention_mask")


@dataclass
class PictureCollate:
    """Makes micro-batches of rows of documents, in the loader's workers.

    Args:
        encoder: has the processor.
        rope_index: positions in several dimensions `[3, b, s]` of what the processor made; None: one dimension.
        packed: lay documents end to end; False: one padded document a row.
        blanks: of each kind ("picture", "video") that the data have, a document with a small blank one and nothing
            to train.
        positions: how many positions the model has.
    """

    encoder: PictureEncoder
    rope_index: Callable[[Mapping[str, Any]], Tensor] | None
    packed: bool
    blanks: Mapping[str, PictureDocument]
    positions: int | None = None

    def __call__(self, rows: Sequence[Any], width: int, pad_id: int, lacks: Sequence[str] = ()) -> MicroBatch:
        """One micro-batch.

        Args:
            rows: the documents of each row.
            width: tokens per row.
            pad_id: token id for padding.
            lacks: the kinds that another rank has here, so this one runs the tower for them too: on a blank document.

        Raises:
            ValueError: a picture cannot be read, or became other tokens than planned.
        """
        rows = [list(row) for row in rows]
        own = [document.sample_id for row in rows for document in row]
        for kind in lacks:
            width = self._with_blank(rows, self.blanks[kind], width)
        collate = collate_packed if self.packed else collate_padded
        batch = collate(rows, width, pad_id, self.positions)
        batch["sample_ids"] = own
        added = {id(document) for document in self.blanks.values()}
        for index, row in enumerate(rows):  # they are padding: no part of the data
            batch["lengths"][index] -= sum(len(document.input_ids) for document in row if id(document) in added)
        places = []  # row and first token of each document with pictures
        for index, row in enumerate(rows):
            start = 0
            for document in row:
                if _pictured(document):
                    places.append((index, start, document))
                start += len(document.input_ids)
        if self.rope_index is not None:
            batch["position_ids"] = batch["position_ids"].expand(4, -1, -1).clone()
        return self._with_pictures(batch, places) if places else batch

    def _with_blank(self, rows: list[list[Any]], blank: PictureDocument, width: int) -> int:
        """Add a blank document at the end of the last row, or as a row of its own. Returns the width."""
        used = sum(len(document.input_ids) for document in rows[-1])
        if not rows[-1] or (self.packed and used + len(blank.input_ids) <= width):
            rows[-1].append(blank)
        else:
            rows.append([blank])
        return max(width, len(blank.input_ids))

    def _with_pictures(self, batch: MicroBatch, places: list[tuple[int, int, PictureDocument]]) -> MicroBatch:
        documents = [document for _, _, document in places]
        made = self.encoder.inputs([d.text for d in documents], [[p.read() for p in d.pictures] for d in documents])
        real = made["attention_mask"].bool()
        for number, document in enumerate(documents):
            _check_plan(made["input_ids"][number][real[number]], document)
        rows, width = batch["input_ids"].shape
        tokenwise = {key: made[key] for key in self.encoder.tokenwise if key in made}
        for key, value in tokenwise.items():
            batch[key] = value.new_zeros(rows, width, *value.shape[2:])
            for number, (row, start, document) in enumerate(places):
                batch[key][row, start : start + len(document.input_ids)] = value[number][real[number]]
        if self.rope_index is not None:
            several = self.rope_index(made)
            for number, (row, start, document) in enumerate(places):
                end = start + len(document.input_ids)
                batch["position_ids"][1:, row, start:end] = several[:, number][:, real[number]]
        rest = {key: value for key, value in made.items() if key not in (*_OWN, *tokenwise)}
        if crossed := self.encoder.crossing:
            if self.packed:
                raise ValueError(
                    f"packing=True puts several documents into a row, and this model sees pictures by cross-attention "
                    f"({crossed}): those of the whole row. Set packing='auto' or packing=False."
                )
            rest = {key: _by_row(value, [row for row, _, _ in places], rows) for key, value in rest.items()}
        return {**batch, **rest}


def _pictured(document: Any) -> bool:
    return isinstance(document, PictureDocument)


def _by_row(value: Any, rows: list[int], count: int) -> Any:
    """A tensor with one entry for each of `rows`, as one with an entry for each of `count` rows."""
    if not isinstance(value, Tensor) or len(value) != len(rows):
        return value
    whole = value.new_zeros(count, *value.shape[1:])
    whole[torch.tensor(rows)] = value
    return whole


def _check_plan(ids: Tensor, document: PictureDocument) -> None:
    planned = torch.from_numpy(document.input_ids.astype("int64"))
    if len(ids) == len(planned) and bool((ids == planned).all()):
        return
    place = document.pictures[0].place
    raise ValueError(
        f"{place}: its text and pictures became {len(ids):,} tokens, and {len(planned):,} were planned from the sizes "
        "of the pictures. A picture changed since it was read first (cache=False plans anew), or this processor looks "
        "at more than the size of a picture, and then its data cannot be planned."
    )
