"""EvaluatedModule: metrics over validation and test data, and predictions for every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from automodel_trainer.modules.built import BuiltModule
from automodel_trainer.modules.loss import Logits, predictions
from automodel_trainer.modules.metrics import TokenAccuracy
from automodel_trainer.strategies.base.objective import MicroBatch


class EvaluatedModule(BuiltModule):
    """Validates, tests and predicts.

    Attributes:
        metrics: `update(logits, targets)` takes a micro-batch, or this rank's part of one. `compute()` returns numbers
            by name, equal on all ranks. Every rank of a tp group counts the same tokens, so report ratios of sums only.
    """

    metrics: Metric
    _of_loader: dict[int, Metric]

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        self.metrics.to(self.strategy.root_device)
        self.metrics.reset()
        self._of_loader = {}

    def validation_step(
        self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        trainer = self.trainer
        self._evaluate(batch, self._metrics_of(dataloader_idx, trainer.num_val_batches, trainer.val_dataloaders))

    def test_step(self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        trainer = self.trainer
        self._evaluate(batch, self._metrics_of(dataloader_idx, trainer.num_test_batches, trainer.test_dataloaders))

    def _metrics_of(self, loader: int, batches: Any, loaders: Any) -> list[Metric]:
        """What a batch of a loader counts for: all loaders together and, if they have names or are several, its own."""
        if not isinstance(loaders, Mapping) and (not isinstance(batches, list) or len(batches) == 1):
            return [self.metrics]
        if loader not in self._of_loader:
            self._of_loader[loader] = self.build_metrics().to(self.strategy.root_device)
        return [self.metrics, self._of_loader[loader]]

    def build_metrics(self) -> Metric:
        """New metrics (see `metrics`): loss and accuracy per token."""
        return TokenAccuracy()

    def _evaluate(self, batch: Sequence[MicroBatch] | MicroBatch, counted: list[Metric]) -> None:
        self.check_rows(as_list(batch))
        for micro_batch in as_list(batch):
            with self.strategy.split_sequence(*self.split(micro_batch)) as (inputs, targets):
                logits = self.strategy.forward(self.model, inputs).logits
            for metrics in counted:
                metrics.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        if self._counts(type(self).validation_step):
            self._log_evaluation("val", self.trainer.val_dataloaders)

    def on_test_epoch_end(self) -> None:
        if self._counts(type(self).test_step):
            self._log_evaluation("test", self.trainer.test_dataloaders)

    def _counts(self, step: Any) -> bool:
        """Whether a step counts for `metrics`. One that a subclass has overridden may log its own numbers instead."""
        return str(step.__module__).startswith("automodel_trainer.") or bool(self.metrics.update_called)

    def _log_evaluation(self, prefix: str, loaders: Any) -> None:
        """Log all metrics; of several loaders also each one's, as `val_loss/NAME` or `val_loss/dataloader_idx_1`."""
        named = list(loaders) if isinstance(loaders, Mapping) else []
        counted = {"": self.metrics}
        for number, metrics in sorted(self._of_loader.items()):
            counted["/" + (named[number] if number < len(named) else f"dataloader_idx_{number}")] = metrics
        for suffix, metrics in counted.items():
            values = metrics.compute()
            metrics.reset()
            # equal on all ranks already; `sync_dist` only says so to Lightning
            found = {f"{prefix}_{name}{suffix}": value.float() for name, value in values.items()}
            self.log_dict(found, sync_dist=True, add_dataloader_idx=False)

    def predict_step(
        self, batch: Sequence[MicroBatch] | MicroBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """What `predict` makes of each micro-batch, with its `labels` and `sample_ids`."""
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
