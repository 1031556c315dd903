"""Pad micro-batches to one shape, because the tensors sent between stages have a fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.strategies.context._pytree import map_tensors
from automodel_trainer.strategies.context.split import pad_positions

Part = tuple[dict[str, Any], Any]


def same_shape(parts: Sequence[Part]) -> list[Part]:
    """Pad micro-batches at the end to the largest number of rows and of tokens among them.

    Padding is not trained, and no token attends to it: it comes last, is masked if there is a mask, and is a document
    of its own if positions restart.

    Args:
        parts: for each micro-batch the inputs of the model's forward (`input_ids` `[b, s]`, optionally `position_ids`
            and `attention_mask`) and the targets, whose tensors `[b, s]` are padded in any nesting.

    Returns:
        the same with `[rows, tokens]` for `[b, s]`.

    Raises:
        ValueError: there is no rule to pad one of the inputs.
    """
    shapes = {tuple(inputs["input_ids"].shape) for inputs, _ in parts}
    rows, length = (max(shape[i] for shape in shapes) for i in (0, 1))
    return [_padded(inputs, targets, rows, length) for inputs, targets in parts]


def _padded(inputs: dict[str, Any], targets: Any, rows: int, length: int) -> Part:
    shape = inputs["input_ids"].shape
    if tuple(shape) == (rows, length):
        return inputs, targets
    padded = {name: _input(name, value, inputs, rows, length) for name, value in inputs.items()}
    return padded, map_tensors(lambda t: _pad(t, rows, length, IGNORE_INDEX), targets, shape)


def _input(name: str, value: Any, inputs: dict[str, Any], rows: int, length: int) -> Any:
    """One input, padded to `[rows, length]`."""
    if not isinstance(value, Tensor):
        return value
    shape = inputs["input_ids"].shape
    if name == "position_ids":
        return _positions(value, shape[0], rows, length, restart=inputs.get("attention_mask") is None)
    if value.is_floating_point() or value.shape != shape:
        if name in ("input_ids", "attention_mask") or shape[1] in value.shape:
            raise ValueError(
                f"pp > 1 pads micro-batches of different shapes to one, and there is no rule for the input {name!r} of "
                f"shape {list(value.shape)}. It can pad input_ids, position_ids, attention_mask and other numbers of "
                "each token [rows, tokens]. Use micro-batches of one shape."
            )
        return value  # of pictures
    padded = _pad(value, rows, length, 0)
    if name == "attention_mask":
        padded[len(value) :] = 1  # attention gives NaN for rows in which everything is masked
    return padded


def _positions(value: Tensor, b: int, rows: int, length: int, restart: bool) -> Tensor:
    """Positions `[b, s]`, or several of each token, `[n, b, s]`."""
    if value.ndim == 3:
        return torch.stack([_positions(one, b, rows, length, restart) for one in value])
    longer = pad_positions(value.expand(b, -1), length, restart)
    return torch.cat([longer, torch.arange(length, device=value.device).expand(rows - len(longer), -1)])


def _pad(tensor: Tensor, rows: int, length: int, value: int) -> Tensor:
    """`[b, s]` to `[rows, length]`."""
    return F.pad(tensor, (0, length - tensor.shape[1], 0, rows - tensor.shape[0]), value=value)
