"""The training objective, as a strategy sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MicroBatch = dict[str, Any]
"""A batch as the data module yields it: `input_ids` `[b, s]`, `labels` `[b, s]`, … (ARCHITECTURE.md lists the keys)."""
Part = tuple[dict[str, Any], Any]
"""The inputs of a model's forward, and the targets of the loss."""


class Objective:
    """A training objective: it splits a micro-batch into inputs and targets, and turns the outputs into a summed loss.

    A LightningModule that a strategy runs step by step (`forward_backward`) derives from it.
    """

    model: Any

    def split(self, micro_batch: MicroBatch) -> tuple[dict[str, Any], Any]:
        """The keyword arguments of the model's forward, and the targets of `loss`: tensors `[b, s]`, in any nesting."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss summed over the micro-batch's supervised tokens, 0-dim fp32.

        The losses of two parts of a sequence must add up to the loss of the whole: context parallel computes parts.
        """
        raise NotImplementedError
