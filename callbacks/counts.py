"""Count rows and tokens of batches. Shapes are counted on the host; sums over values stay on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_trainer.nn._torch import pytree
from automodel_trainer.nn.constants import IGNORE_INDEX


class Totals(NamedTuple):
    """Counts over some batches."""

    rows: int = 0
    tokens: int = 0  # b · s
    labels: int = 0  # tokens in micro-batches with labels
    supervised: int = 0  # those of them whose label is not -100
    masked_tokens: int = 0  # tokens in micro-batches with an attention mask
    padding: int = 0  # those of them that are masked
    placed: int = 0  # tokens in micro-batches with position ids
    positions: int = 0  # the sum of their position ids
    tower_kflops: int = 0  # 10³ FLOPs of a vision tower

    def mean_document(self) -> float:
        """The document length, in tokens, at which attention costs as much as it did for these batches."""
        if self.placed:
            return 2 * self.positions / self.placed + 1  # a token at position p attends to p + 1 tokens
        return self.tokens / self.rows


class Counts:
    """Sums counts over batches of any kind: lists of micro-batches, dicts of tensors, or other DataLoader output."""

    def __init__(self) -> None:
        self._host = dict.fromkeys(Totals._fields, 0)
        self._device: dict[str, Tensor] = {}

    def add(self, batch: Any) -> None:
        """Count one batch, without waiting for the device."""
        for micro_batch in micro_batches(batch):
            ids = micro_batch.get("input_ids")
            if isinstance(ids, Tensor) and ids.ndim == 2:
                self._add_tokens(ids, micro_batch)
        if not self._host["tokens"]:  # batches without tokens: count their rows only
            self._host["rows"] += rows_of(batch)

    def _add_tokens(self, ids: Tensor, micro_batch: Mapping[str, Any]) -> None:
        self._host["rows"] += ids.shape[0]
        self._host["tokens"] += ids.numel()
        for key, of, name, summed in (
            ("labels", "labels", "supervised", lambda t: (t != IGNORE_INDEX).sum()),
            ("attention_mask", "masked_tokens", "padding", lambda t: (t == 0).sum()),
            ("position_ids", "placed", "positions", lambda t: t.sum()),
        ):
            values = micro_batch.get(key)
            if isinstance(values, Tensor) and values.shape == ids.shape:
                self._host[of] += ids.numel()
                self._device[name] = self._device.get(name, 0) + summed(values)

    def add_tower(self, flops: Tensor) -> None:
        """Count the FLOPs of a vision tower, 0-dim."""
        self._device["tower_kflops"] = self._device.get("tower_kflops", 0) + flops / 1e3

    def totals(self) -> Totals:
        """The counts so far. Waits for the device."""
        return Totals(*(int(count) for count in self.tensor(torch.device("cpu")).tolist()))

    def tensor(self, device: torch.device) -> Tensor:
        """The counts in the order of `Totals`, as an int64 tensor `[9]` on `device`."""
        host = torch.tensor(list(self._host.values()), device=device)
        for name, count in self._device.items():
            host[Totals._fields.index(name)] = count
        return host


def micro_batches(batch: Any) -> list[Mapping[str, Any]]:
    """The dicts of tensors in a batch; an empty list for batches of another kind."""
    if isinstance(batch, Mapping):
        return [batch]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and all(isinstance(m, Mapping) for m in batch):
        return list(batch)
    return []


def rows_of(batch: Any) -> int:
    """The first dimension of the first tensor in a batch; 0 if there is none."""
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)
