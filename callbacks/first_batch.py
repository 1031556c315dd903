"""The beginning of the first batch as plain data, for the ledger: which text is trained, masked and padding."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import lightning.pytorch as pl

from automodel_trainer.callbacks.layout import tokenizer_of
from automodel_trainer.data.preview_rows import read_rows

MOST_TOKENS = 1024  # of the first row; the rest is left out


def first_row(module: pl.LightningModule, batch: Any) -> list[list[list[str]]] | None:
    """The first row of a batch: its documents, each a list of `[kind, text]` of consecutive tokens of one kind.

    Kinds are `trained`, `masked` and `padding`. None if the batch is no list of micro-batches with `input_ids` and
    `labels`, or nobody can turn tokens into text.

    Args:
        module: has the tokenizer.
        batch: of one optimizer step.
    """
    first = batch[0] if isinstance(batch, list) and batch else batch
    tokenizer = tokenizer_of(module)
    if tokenizer is None or not isinstance(first, dict) or not {"input_ids", "labels"} <= first.keys():
        return None
    keys = ("input_ids", "labels", "position_ids", "attention_mask")
    beginning = {key: first[key][..., :1, :MOST_TOKENS] for key in keys if key in first}
    row = next(read_rows([beginning], tokenizer))
    return [
        [[kind, "".join(token.text for token in tokens)] for kind, tokens in groupby(document.tokens, lambda t: t.kind)]
        for document in row.documents
    ]
