"""The training loss of each source of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from automodel_trainer.modules.linear_cross_entropy import Groups
from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.strategies.base.objective import MicroBatch


class SourceLosses:
    """Sums of loss and supervised tokens of each source since the last log step. Nothing here waits for the device.

    Args:
        names: the sources, in the order of the micro-batches' `sources`.
        strategy: adds the sums up over ranks.
    """

    def __init__(self, names: Sequence[str], strategy: MeshStrategy) -> None:
        self.names, self.strategy = list(names), strategy
        self._loss = torch.zeros(len(names), dtype=torch.float64, device=strategy.root_device)
        self._tokens = torch.zeros(len(names), dtype=torch.int64, device=strategy.root_device)

    def groups(self, sources: Tensor) -> Groups:
        """Where the losses of tokens of these sources (`[b, s]`, −100 for padding) belong."""
        return Groups(sources.flatten().clamp(min=0), self._loss)

    def count(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Count the supervised tokens of an optimizer step."""
        for micro_batch in micro_batches:
            if "sources" in micro_batch:
                tokens = (micro_batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)  # nothing predicts column 0
                self._tokens.index_add_(0, micro_batch["sources"], tokens)

    def sums(self) -> tuple[list[float], list[int]]:
        """Loss and tokens of each source over all ranks. Collective; waits for the device."""
        # Ranks of a tensor-parallel group have the same losses, and of a pipeline only the last has any.
        loss = self.strategy.reduce(self._loss.clone(), reduce_op="sum") / self.strategy.dims.tp
        return loss.tolist(), self.strategy.sum_over_rows(self._tokens.clone()).tolist()

    def pop(self) -> dict[str, float]:
        """The loss per supervised token of each source that had any since the last call. Collective; waits."""
        means = {name: loss / tokens for name, loss, tokens in zip(self.names, *self.sums()) if tokens}
        self._loss.zero_()
        self._tokens.zero_()
        return means

    def state(self) -> dict[str, Any]:
        """The sums over all ranks as plain values. Collective; waits for the device."""
        loss, tokens = self.sums()
        return {"names": self.names, "loss": loss, "tokens": tokens}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; of other sources nothing is taken."""
        if state["names"] != self.names:
            return
        if self.strategy.global_rank == 0:
            self._loss += torch.tensor(state["loss"], dtype=torch.float64).to(self._loss) * self.strategy.dims.tp
        if self.strategy.dp_rank == 0:
            self._tokens += torch.tensor(state["tokens"]).to(self._tokens)
