"""One optimizer step of an objective: forward and backward of its micro-batches, and the global clip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.distributed.phase import enter_phase
from automodel_trainer.nn.deferred_logits import deferred_logits
from automodel_trainer.nn.step_cache import unchanged_weights
from automodel_trainer.strategies.base.clip import clip_grad_norm_
from automodel_trainer.strategies.base.objective import MicroBatch, Objective, Part, marked_part, unmarked


class StepRunner:
    """Runs an objective's micro-batches through a laid-out model.

    Gradients are those of (sum of token losses over all ranks) / (supervised tokens of the global batch). They do not
    depend on the layout, on gradient accumulation or on the number of ranks.
    """

    root_device: Any  # the strategy defines it
    needs_every_gradient = False  # a step whose forward leaves out a trained parameter hangs or fails on several ranks

    plain_backward = True  # `loss.backward()` alone leaves its gradients in `parameter.grad`

    @property
    def gradient_scale(self) -> float:
        """The factor on each loss that makes the reduced gradient the *sum* over ranks."""
        return 1.0

    def gradient_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """A context around one micro-batch. Gradients need to be reduced over ranks only in the `last` one."""
        return nullcontext()

    def split_sequence(self, inputs: dict[str, Any], targets: Any) -> AbstractContextManager[Part]:
        """A context around forward and backward that yields this rank's part of a micro-batch.

        The part is the whole micro-batch unless the layout splits sequences over ranks.

        Args:
            inputs: keyword arguments of the model's forward: tensors `[b, s]`.
            targets: targets of the loss: tensors `[b, s]`, in any nesting.
        """
        return nullcontext((inputs, targets))

    def gather_sequence(self, tensor: Tensor, length: int) -> Tensor:
        """Gather the parts `[b, s, …]` that the ranks computed into `[b, length, …]`. Collective, without gradient."""
        return tensor

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Run one forward of the laid-out model for an objective, whose loss takes deferred logits."""
        with deferred_logits():
            return model(**inputs)

    def sum_over_stages(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` `[…]` in place over the ranks that hold different layers. Collective."""
        return tensor

    def from_logits(self, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Compute something from the logits of an evaluation, and return it on every rank.

        Some layouts hold the logits of `forward` on only one of several ranks, and None on the others.

        Args:
            compute: called on the rank that holds the logits.
            shape, dtype: those of the tensor that `compute` returns.
        """
        return compute()

    def forward_backward(self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: Tensor) -> Tensor:
        """Run forward and backward of one optimizer step.

        Args:
            objective: the module to train.
            micro_batches: this rank's share of the global batch. Every rank must have the same number of them.
            num_tokens: number of supervised tokens in the whole global batch, 0-dim, on the device.

        Returns:
            the sum of this rank's token losses: 0-dim, detached, on the device.
        """
        # A global batch without supervised tokens gives gradients of zero, not NaN.
        scale = self.gradient_scale / num_tokens.clamp(min=1)
        total = torch.zeros((), device=self.root_device)
        with unchanged_weights(), objective.in_step(self, micro_batches, num_tokens):
            for index, micro_batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                total += self._micro_step(objective, micro_batch, scale, last)
        return total

    def _micro_step(self, objective: Objective, micro_batch: MicroBatch, scale: Tensor, last: bool) -> Tensor:
        """Run forward and backward of one micro-batch; return its summed token losses, 0-dim, detached."""
        inputs, targets = marked_part(objective, micro_batch)
        with self.split_sequence(inputs, targets) as (part, own), self.gradient_sync(objective.model, last=last):
            enter_phase("forward")
            wanted, marks = unmarked(own)
            loss = objective.loss(self.forward(objective.model, part), wanted)
            beside = objective.side_loss(marks)
            loss = loss if beside is None else loss + beside
            enter_phase("backward")
            (loss * scale).backward()
        return loss.detach()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
        """Clip gradients to `max_norm` (None or 0: measure only); return the global norm before clipping, 0-dim."""
        enter_phase("clip")
        return clip_grad_norm_(parameters, max_norm)
