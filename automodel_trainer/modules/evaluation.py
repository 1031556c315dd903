"""EvaluatedModule: metrics over validation and test data, and predictions for every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from automodel_trainer.modules.built import BuiltModule
from automodel_trainer.modules.loss import Logits, predictions
from automodel_trainer.strategies.base.objective import MicroBatch


class EvaluatedModule(BuiltModule):
    """Validates, tests and predicts.

    Attributes:
        metrics: `update(logits, targets)` takes a micro-batch, or this rank's part of one. `compute()` returns numbers
            by name, equal on all ranks. Every rank of a tp group counts the same tokens, so report ratios of sums only.
    """

    metrics: Metric

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
        self.check_rows(as_list(batch))
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
        # The values are already equal on all ranks. Without `sync_dist` Lightning would warn that they may not be.
        self.log_dict({f"{prefix}_{name}": value.float() for name, value in values.items()}, sync_dist=True)

    def predict_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The result of `predict` for each micro-batch, with its `labels` and `sample_ids`."""
        return [
            self.predict(micro_batch)
            | {key: micro_batch[key] for key in ("labels", "sample_ids") if key in micro_batch}
            for micro_batch in as_list(batch)
        ]

    def predict(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The predictions for a micro-batch, by name. Collective: a subclass computes them with `per_token`.

        The default is `predictions`, the most likely class of every token, int64 `[b, s]`.
        """
        return {"predictions": self.per_token(micro_batch, lambda logits, targets: predictions(logits), torch.int64)}

    def per_token(
        self, micro_batch: MicroBatch, compute: Callable[[Logits, Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """One value for every token of a micro-batch, on any layout. Collective.

        Args:
            compute: takes logits `[b, s, v]` and targets `[b, s]` of a part of the sequence, and returns `b·s` values.
            dtype: of the values.

        Returns:
            `[b, s]`, the whole sequence on every rank.
        """
        self.check_rows([micro_batch])
        whole = self.split(micro_batch)
        with self.strategy.split_sequence(*whole) as (inputs, targets):
            logits = self.strategy.forward(self.model, inputs).logits
            values = self.strategy.from_logits(lambda: compute(logits, targets).view_as(targets), targets.shape, dtype)
        return self.strategy.gather_sequence(values, whole[1].shape[1])


def as_list(batch: Sequence[MicroBatch] | MicroBatch) -> Sequence[MicroBatch]:
    """The micro-batches of a batch. A user's own DataLoader yields one micro-batch, which becomes a list of one."""
    return [dict(batch)] if isinstance(batch, Mapping) else batch
