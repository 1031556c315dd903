"""Evaluation of a language model: loss and accuracy over validation data, log-probabilities of any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from automodel_trainer.modules.hugging_face import HuggingFaceModule
from automodel_trainer.modules.loss import token_losses
from automodel_trainer.modules.metrics import TokenMetrics

MicroBatch = dict[str, Any]


class EvaluatedModule(HuggingFaceModule):
    """Validates, tests and predicts."""

    metrics: TokenMetrics

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        self.metrics.to(self.strategy.root_device)
        self.metrics.reset()

    def validation_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: Sequence[MicroBatch] | MicroBatch) -> None:
        for micro_batch in as_list(batch):
            with self.strategy.split_sequence(*self.split(micro_batch)) as (inputs, targets):
                logits = self.strategy.forward(self.model, inputs).logits
            self.metrics.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, prefix: str) -> None:
        values = self.metrics.compute()
        self.metrics.reset()
        # equal on all ranks already; `sync_dist` only says so to Lightning
        self.log_dict({f"{prefix}_{name}": value.float() for name, value in values.items()}, sync_dist=True)

    def predict_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Score the data: per micro-batch the log-probability of every supervised token, fp32 `[b, s]` aligned with
        `input_ids` (0 elsewhere), with `labels` and `sample_ids`."""
        scored = []
        for micro_batch in as_list(batch):
            with self.strategy.split_sequence(*self.split(micro_batch)) as (inputs, targets):
                losses = self._losses(inputs, targets)
            losses = self.strategy.gather_sequence(losses, micro_batch["labels"].shape[1])
            named: dict[str, Any] = {key: micro_batch[key] for key in ("labels", "sample_ids") if key in micro_batch}
            scored.append({"log_probs": torch.nn.functional.pad(-losses[:, :-1], (1, 0)), **named})
        return scored

    def _losses(self, inputs: dict[str, Any], targets: Tensor) -> Tensor:
        """Per token, fp32 `[b, s]`, on every rank."""
        logits = self.strategy.forward(self.model, inputs).logits
        return self.strategy.from_logits(
            lambda: token_losses(logits, targets).view_as(targets), targets.shape, torch.float32
        )


def as_list(batch: Sequence[MicroBatch] | MicroBatch) -> Sequence[MicroBatch]:
    """A loader of plain batches (a user's own DataLoader) yields one micro-batch per step."""
    return [dict(batch)] if isinstance(batch, Mapping) else batch
