"""Split a row at the decoder's input, for models that put pictures among the embeddings of text.

What comes before the decoder runs on whole rows on every rank: the vision tower, the projector and the embeddings. Each
rank's gradients of these come from its own tokens, and the sum over ranks is that of one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.strategies.context.attention import Sequences, running


def split_at_decoder(model: PreTrainedModel) -> None:
    """Let the decoder of `model` compute on this rank's tokens while a micro-batch is split."""
    model.get_decoder().register_forward_pre_hook(_cut_inputs, with_kwargs=True)


def _cut_inputs(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    sequences = running()
    if sequences is None or sequences.cut is None:
        return None
    whole = sequences.position_ids
    assert not args, f"{type(decoder).__name__} takes its inputs by position"
    kwargs = dict(kwargs)
    marks = [v for v in kwargs.values() if isinstance(v, Tensor) and v.dtype == torch.bool and v.shape == whole.shape]
    numbers = {int(mark.sum()): _numbers(mark, sequences) for mark in marks}  # counting waits for the device: once
    cut = {name: _cut(name, value, sequences, numbers) for name, value in kwargs.items()}
    if cut.get("position_ids") is None:
        cut["position_ids"] = sequences.cut(whole, 1)
    if cut.get("attention_mask") is None:  # transformers would look for documents in the positions of a shard
        cut["attention_mask"] = torch.ones_like(sequences.cut(whole, 1))
    return args, cut


def _cut(name: str, value: Any, sequences: Sequences, numbers: dict[int, Tensor]) -> Any:
    """One of the decoder's inputs, a tensor or a list of some, for this rank's tokens.

    Masks of whole rows stay: attention takes them. Features have a row for each marked token; `numbers` says which rows
    are this rank's, by how many marked tokens there are.
    """
    assert sequences.cut is not None
    if isinstance(value, list | tuple):
        return type(value)(_cut(name, item, sequences, numbers) for item in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    rows, length = sequences.position_ids.shape
    if value.ndim == 4 and value.shape[-2:] == (length, length):
        return value
    if value.shape[:2] == (rows, length):
        return sequences.cut(value, 1)
    if value.shape == (1, length):  # positions that are the same for all rows
        return sequences.cut(value.expand(rows, length), 1)
    if value.ndim == 3 and value.shape[1:] == (rows, length):  # positions in several dimensions
        return sequences.cut(value, 2)
    if len(value) in numbers:
        return value[numbers[len(value)]]
    if length not in value.shape:
        return value
    raise ValueError(
        f"Context parallel (cp > 1) cannot split the decoder's input {name!r} of shape {list(value.shape)}: rows are "
        f"{rows} × {length} tokens. Set cp=1."
    )


def _numbers(mark: Tensor, sequences: Sequences) -> Tensor:
    """Which of the marked tokens are this rank's, in its order: int64 `[n]`."""
    assert sequences.cut is not None
    numbers = (mark.flatten().cumsum(0) - 1).view_as(mark)
    return sequences.cut(numbers, 1)[sequences.cut(mark, 1)]
