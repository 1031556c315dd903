"""What is trained, as a strategy sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MicroBatch = dict[str, Any]
Part = tuple[dict[str, Any], Any]
"""The inputs of a model's forward, and the targets of the loss."""


class Objective:
    """What is trained: a module that hands a micro-batch to its model and turns the outputs into a summed loss.

    A LightningModule that a strategy runs step by step (`forward_backward`) has this as a base.
    """

    model: Any

    def split(self, micro_batch: MicroBatch) -> tuple[dict[str, Any], Any]:
        """The keyword arguments of the model's forward, and the targets of `loss`."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss summed over the micro-batch's supervised tokens, 0-dim fp32."""
        raise NotImplementedError
