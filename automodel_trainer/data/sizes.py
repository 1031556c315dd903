"""Compare data with the sizes of a model: token ids with its embedding, documents with its positions, and labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_trainer.data.rows import Rows
from automodel_trainer.nn.constants import IGNORE_INDEX


def check_tokens(split: str, rows: Rows, vocabulary: int, tokenizer: Any) -> None:
    """Compare the token ids of a split with the embedding.

    Args:
        split: the name of the split.
        rows: its rows.
        vocabulary: the number of ids that the model embeds.
        tokenizer: names the token.

    Raises:
        ValueError: an id lies beyond the embedding.
    """
    found, sample = rows.highest()
    if found < vocabulary:
        return
    known = len(tokenizer) if tokenizer is not None else None
    name = f" ({tokenizer.convert_ids_to_tokens(found)!r})" if known is not None and found < known else ""
    holds = f" The tokenizer has {known:,} tokens." if known is not None else ""
    raise ValueError(
        f"Sample {sample} of the {split} data has token {found}{name}, and the model's vocab_size is {vocabulary:,}: "
        f"its last token is {vocabulary - 1}.{holds} Use the model's own tokenizer, or enlarge the model first: "
        f"model.resize_token_embeddings({max(found + 1, known or 0)}), save it, and train from there."
    )


def check_positions(split: str, rows: Rows, positions: int, rotary: bool) -> None:
    """Compare the longest document of a split with the model's positions.

    Args:
        split: the name of the split.
        rows: its rows.
        positions: the number of positions that the model has.
        rotary: whether the model can be told that it has more.

    Raises:
        ValueError: a document has more tokens than the model has positions.
    """
    if rows.longest > positions:
        raise ValueError(too_long(f"A document of the {split} data has {rows.longest:,} tokens", positions, rotary))


def too_long(what: str, positions: int, rotary: bool) -> str:
    """The message about a document that is longer than a model's positions allow."""
    more = (
        " If its rotary positions are to reach further, say so: config_overrides={'max_position_embeddings': …}, with "
        "rope_parameters that scale them if need be."
        if rotary
        else " They are learned, so there are no more."
    )
    return (
        f"{what}, and the model has {positions:,} positions (max_position_embeddings). Set seq_len={positions} or less."
        f"{more}"
    )


def check_micro_batch(
    micro_batch: Any, vocabulary: int | None, positions: int | None, rotary: bool, classes: int | None
) -> None:
    """Compare a micro-batch on the host with the sizes of a model. One that is on a device already is left alone.

    Args:
        micro_batch: a dict of tensors; anything else is left alone.
        vocabulary: the number of ids that the model embeds.
        positions: the number of positions that it has.
        rotary: whether the model can be told that it has more.
        classes: labels are below this number.

    Raises:
        ValueError: an id, a position or a label lies beyond.
    """
    if not isinstance(micro_batch, dict):
        return
    _check_shapes(micro_batch)
    ids, labels = _integers(micro_batch, "input_ids"), _integers(micro_batch, "labels")
    places = _integers(micro_batch, "position_ids")
    if ids is not None and vocabulary is not None:
        low, high = _range(ids)
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"input_ids hold token {low if low < 0 else high}, and the model's vocab_size is {vocabulary:,}: ids "
                f"are 0 to {vocabulary - 1}. Use the model's own tokenizer, or resize the model's embeddings first."
            )
    if labels is not None and classes is not None:
        used = labels[labels != IGNORE_INDEX]
        low, high = _range(used)
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels hold {low if low < 0 else high}, and the model predicts {classes:,} classes: labels are 0 to "
                f"{classes - 1}, or {IGNORE_INDEX} where nothing is trained."
            )
    if positions is not None:
        last = _range(places)[1] if places is not None else -1 if ids is None or ids.ndim != 2 else ids.shape[1] - 1
        if last >= positions:
            raise ValueError(too_long(f"A row has position {last:,}", positions, rotary))


def _check_shapes(micro_batch: dict[str, Any]) -> None:
    ids = micro_batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return
    if ids.is_floating_point():
        raise ValueError(f"input_ids are {ids.dtype}. Give token ids, which are int64.")
    for key in ("labels", "attention_mask"):
        value = micro_batch.get(key)
        if isinstance(value, Tensor) and value.ndim == ids.ndim and value.shape != ids.shape:
            raise ValueError(
                f"{key} are {list(value.shape)} and input_ids {list(ids.shape)}. Give both the same shape, a row and a "
                "column for each token; labels are not shifted."
            )


def _integers(micro_batch: dict[str, Any], key: str) -> Tensor | None:
    value = micro_batch.get(key)
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return None
    return None if value.is_floating_point() or value.dtype == torch.bool else value


def _range(values: Tensor) -> tuple[int, int]:
    """The smallest and the largest value; (0, −1) if there is none."""
    if values.numel() == 0:
        return 0, -1
    low, high = values.aminmax()
    return int(low), int(high)
