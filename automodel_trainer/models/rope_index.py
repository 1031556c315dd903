"""Rotary positions in several dimensions (M-RoPE): the model's own rule, computed where the data are made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel


class RopeIndex:
    """The positions that a model gives to the tokens of text and pictures. It computes nothing with weights.

    Args:
        model: on meta or real. Nothing of its weights is read.

    Raises:
        ValueError: the model counts its tokens in one dimension.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not has_rope_index(model):
            raise ValueError(f"{type(model).__name__} counts its tokens in one dimension.")
        self._compute = cast(Any, model.base_model).get_rope_index
        self.takes = tuple(inspect.signature(self._compute).parameters)

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Time, height and width of every token.

        Args:
            inputs: what the processor made of padded documents: `input_ids` `[b, s]` and what belongs to them.

        Returns:
            int64 `[3, b, s]`. Those of padding mean nothing.
        """
        positions: Tensor
        positions, _ = self._compute(**{name: inputs[name] for name in self.takes if name in inputs})
        return positions


def has_rope_index(model: PreTrainedModel) -> bool:
    """Whether a model's positions have several dimensions where there are pictures."""
    return callable(getattr(model.base_model, "get_rope_index", None))
