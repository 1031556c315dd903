"""Which document of a micro-batch each token belongs to, and which tokens are padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.strategies.base.objective import MicroBatch


@dataclass
class Documents:
    """The documents of a micro-batch.

    Attributes:
        marks: int64 `[b, s]`, the number of each token's document; −100 for padding.
        sizes: int64 `[2]`, the number of tokens that are no padding, and of their documents.
        at_most: marks are below this.
    """

    marks: Tensor
    sizes: Tensor
    at_most: int


def documents_of(micro_batch: MicroBatch) -> Documents:
    """The documents of a micro-batch.

    Padding is what `lengths` says (int64 `[b]`, the length of each row without padding), or else `attention_mask`. In
    packed rows, which have no mask, documents begin where `position_ids` are 0; elsewhere a row is a document.
    """
    ids: Tensor = micro_batch["input_ids"]
    place = torch.arange(ids.shape[1], device=ids.device)
    lengths, mask = micro_batch.get("lengths"), micro_batch.get("attention_mask")
    if lengths is not None:
        real = place < lengths[:, None]
    else:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    starts = (place == 0).expand_as(ids)
    positions = micro_batch.get("position_ids")
    rows = ids.shape[0]
    if positions is not None and mask is None and micro_batch.get("packed") is not False:
        starts = starts | ((positions if positions.ndim == 2 else positions[0]) == 0)
        known = micro_batch.get("document_lengths")
        rows = sum(map(len, known)) if known is not None else int(starts.sum())
    numbers = starts.reshape(-1).cumsum(0).view_as(ids) - 1
    marks = numbers.masked_fill(~real, IGNORE_INDEX)
    last = ids.numel()
    found = torch.zeros(last + 1, dtype=torch.int64, device=ids.device)
    found.scatter_(0, numbers.masked_fill(~real, last).reshape(-1), 1)
    return Documents(marks, torch.stack([real.sum(), found[:last].sum()]), rows)
