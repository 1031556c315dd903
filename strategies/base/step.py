"""Running one optimizer step of an objective: forward and backward of its micro-batches, and the global clip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.distributed.phase import enter_phase
from automodel_trainer.nn.deferred_logits import deferred_logits
from automodel_trainer.nn.step_cache import unchanged_weights
from automodel_trainer.strategies.base.clip import clip_grads_, total_grad_norm
from automodel_trainer.strategies.base.objective import MicroBatch, Objective, Part


class StepRunner:
    """Runs an objective's micro-batches through a laid-out model.

    Gradients are those of (sum of token losses over all ranks) / (supervised tokens of the global batch), whatever the
    layout, the accumulation and the number of ranks.
    """

    root_device: Any  # of the strategy

    @property
    def gradient_scale(self) -> float:
        """What a loss is multiplied by so that the reduced gradient is the *sum* over ranks."""
        return 1.0

    def gradient_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """A context for one micro-batch. Gradients need to be reduced over ranks only in the `last` one."""
        return nullcontext()

    def split_sequence(self, inputs: dict[str, Any], targets: Any) -> AbstractContextManager[Part]:
        """This rank's part of a micro-batch, where sequences are split over ranks. Covers forward and backward."""
        return nullcontext((inputs, targets))

    def gather_sequence(self, tensor: Tensor, length: int) -> Tensor:
        """The whole `[b, length, …]` of the parts `[b, s, …]` that the ranks computed. Collective, without gradient."""
        return tensor

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """One forward of the laid-out model, for an objective: its loss takes logits that are deferred."""
        with deferred_logits():
            return model(**inputs)

    def from_logits(self, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What `compute` makes of an evaluation's logits, on every rank.

        Some layouts have the logits of `forward` on one of several ranks only, and None elsewhere.

        Args:
            compute: called where the logits are.
            shape, dtype: of what it returns.
        """
        return compute()

    def forward_backward(self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: Tensor) -> Tensor:
        """Forward and backward of one optimizer step.

        Args:
            objective: the module that is trained.
            micro_batches: this rank's share of the global batch; the same number on every rank.
            num_tokens: supervised tokens of the whole global batch, 0-dim, on the device.

        Returns:
            this rank's token losses, summed: 0-dim, detached, on the device.
        """
        scale = self.gradient_scale / num_tokens.clamp(min=1)
        total = torch.zeros((), device=self.root_device)
        with unchanged_weights():
            for index, micro_batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                total += self._micro_step(objective, micro_batch, scale, last)
        return total

    def _micro_step(self, objective: Objective, micro_batch: MicroBatch, scale: Tensor, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; its summed token losses, 0-dim, detached."""
        inputs, targets = objective.split(micro_batch)
        with self.split_sequence(inputs, targets) as (part, wanted), self.gradient_sync(objective.model, last=last):
            enter_phase("forward")
            loss = objective.loss(self.forward(objective.model, part), wanted)
            enter_phase("backward")
            (loss * scale).backward()
        return loss.detach()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
        """Clip to `max_norm` (None or 0: only measure); returns the global norm before clipping, 0-dim."""
        enter_phase("clip")
        parameters = list(parameters)
        norm = total_grad_norm(parameters)
        if max_norm:
            clip_grads_(parameters, max_norm, norm)
        return norm
