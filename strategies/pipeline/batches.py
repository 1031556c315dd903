"""Micro-batches of one shape: what travels between stages has the same size for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from automodel_trainer.strategies.context.split import IGNORE_INDEX, pad_positions

Part = tuple[dict[str, Any], Any]


def same_shape(parts: Sequence[Part]) -> list[Part]:
    """Pad micro-batches at their ends to the most rows and the most tokens that one of them has.

    Nothing is trained on the padding, and nothing sees it: it comes last, is masked where there is a mask, and is a
    document of its own where positions restart.

    Args:
        parts: inputs of the model's forward (`input_ids` `[b, s]`, with or without `position_ids`, `attention_mask`),
            and targets, of which tensors `[b, s]` are padded, in any nesting.

    Raises:
        ValueError: an input that there is no rule to pad by.
    """
    shapes = {tuple(inputs["input_ids"].shape) for inputs, _ in parts}
    rows, length = (max(shape[i] for shape in shapes) for i in (0, 1))
    return [_padded(inputs, targets, rows, length) for inputs, targets in parts]


def _padded(inputs: dict[str, Any], targets: Any, rows: int, length: int) -> Part:
    shape = inputs["input_ids"].shape
    if tuple(shape) == (rows, length):
        return inputs, targets
    padded = {name: _input(name, value, inputs, rows, length) for name, value in inputs.items()}
    return padded, tree_map(
        lambda t: _pad(t, rows, length, IGNORE_INDEX) if isinstance(t, Tensor) and t.shape == shape else t, targets
    )


def _input(name: str, value: Any, inputs: dict[str, Any], rows: int, length: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    if name == "position_ids":
        restart = inputs.get("attention_mask") is None
        longer = pad_positions(value.expand(len(inputs["input_ids"]), -1), length, restart)
        return torch.cat([longer, torch.arange(length, device=value.device).expand(rows - len(longer), -1)])
    if name not in ("input_ids", "attention_mask") or value.shape != inputs["input_ids"].shape:
        raise ValueError(
            f"pp > 1 pads micro-batches of different shapes to one, and there is no rule for the input {name!r} of "
            f"shape {list(value.shape)}. Give micro-batches of one shape."
        )
    padded = _pad(value, rows, length, 0)
    if name == "attention_mask":
        padded[len(value) :] = 1  # rows that see nothing at all would come out as NaN
    return padded


def _pad(tensor: Tensor, rows: int, length: int, value: int) -> Tensor:
    return F.pad(tensor, (0, length - tensor.shape[1], 0, rows - tensor.shape[0]), value=value)
