"""Metrics: the training loss between two log steps, and loss and accuracy per token over an evaluation."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from automodel_trainer.modules.loss import Logits, losses_and_predictions
from automodel_trainer.nn.constants import IGNORE_INDEX


class TokenAccuracy(Metric):
    """Cross-entropy and accuracy per supervised token, over all batches and ranks.

    The sums are fp64, so that the result does not depend on the number of batches or ranks.
    """

    full_state_update = False
    loss_sum: Tensor
    tokens: Tensor
    correct: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("loss_sum", "tokens", "correct"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Logits | None, targets: Tensor) -> None:
        """Add one micro-batch: logits `[b, s, v]`, targets `[b, s]`.

        Pipeline ranks without the last stage pass None and count nothing. The last stage's ranks count for all.
        """
        if logits is None:
            return
        losses, predictions = losses_and_predictions(logits, targets)
        targets = targets.flatten()
        trained = targets != IGNORE_INDEX
        self.loss_sum += losses.sum(dtype=torch.float64)
        self.tokens += trained.sum()
        self.correct += (predictions.eq(targets) & trained).sum()

    def compute(self) -> dict[str, Tensor]:
        """`loss` in nats and `token_accuracy` between 0 and 1, both per supervised token, 0-dim fp64."""
        return {"loss": self.loss_sum / self.tokens, "token_accuracy": self.correct / self.tokens}


class TokenMetrics(TokenAccuracy):
    """`TokenAccuracy` with perplexity, for language models."""

    def compute(self) -> dict[str, Tensor]:
        values = super().compute()
        return {"loss": values["loss"], "perplexity": values["loss"].exp(), "token_accuracy": values["token_accuracy"]}


class LossWindow:
    """Sums of loss and tokens since the last log step. They stay on the device, and nothing here waits for it."""

    def __init__(self) -> None:
        self.loss_sum: Tensor | None = None
        self.tokens: Tensor | None = None

    def add(self, loss_sum: Tensor, tokens: Tensor) -> None:
        """Add one optimizer step: this rank's summed loss and the global batch's supervised tokens, both 0-dim."""
        loss_sum = loss_sum.double()
        self.loss_sum = loss_sum if self.loss_sum is None else self.loss_sum + loss_sum
        self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def sums(self) -> tuple[Tensor, Tensor]:
        """This rank's loss sum (fp64) and the global token count since the last `pop`, both 0-dim."""
        assert self.loss_sum is not None
        assert self.tokens is not None
        return self.loss_sum, self.tokens

    def pop(self) -> tuple[Tensor, Tensor]:
        """Return `sums` and reset them."""
        sums = self.sums()
        self.loss_sum = self.tokens = None
        return sums

    def __bool__(self) -> bool:
        return self.loss_sum is not None


class FiniteGuard:
    """Remembers the first step whose loss or gradient norm was not finite, and the samples of recent steps.

    The first bad step stays on the device, so `add` does not wait for it. Whoever reads `first_bad` does.

    Args:
        keep: for how many steps sample ids are remembered.
    """

    def __init__(self, keep: int) -> None:
        self._first_bad: Tensor | None = None
        self._samples: deque[tuple[int, list[int]]] = deque(maxlen=keep)

    def add(self, step: int, loss_sum: Tensor, grad_norm: Tensor, sample_ids: list[int]) -> None:
        """Note one optimizer step, counted from 1. Loss and norm are 0-dim."""
        bad = ~(torch.isfinite(loss_sum) & torch.isfinite(grad_norm.to(loss_sum.device)))
        mark = torch.where(bad, float(step), float("inf"))
        self._first_bad = mark if self._first_bad is None else torch.minimum(self._first_bad, mark)
        self._samples.append((step, sample_ids))

    def first_bad(self) -> Tensor | None:
        """The first bad step, 0-dim; infinity if there was none, None before any step."""
        return self._first_bad

    def samples_of(self, step: int) -> list[int] | None:
        """The sample ids of a step, if they are still remembered."""
        return next((ids for s, ids in self._samples if s == step), None)
