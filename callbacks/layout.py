"""Facts about the layout that callbacks need, for our strategies and for Lightning's."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor, nn

from automodel_trainer.nn.tower_flops import TowerWork
from automodel_trainer.nn.towers import towers_of
from automodel_trainer.strategies import MeshStrategy, Objective


def trained_model(trainer: pl.Trainer) -> nn.Module:
    """The module whose parameters are trained."""
    strategy = trainer.strategy
    return strategy.trained_module if isinstance(strategy, MeshStrategy) else trainer.lightning_module


def dp_size(trainer: pl.Trainer) -> int:
    """The number of ranks that see different data."""
    strategy = trainer.strategy
    return strategy.dp_size if isinstance(strategy, MeshStrategy) else trainer.world_size


def sum_over_ranks(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """Sum a tensor of any shape over all ranks. It must be on the strategy's device. Collective."""
    return trainer.strategy.reduce(tensor, reduce_op="sum")  # type: ignore[return-value]


def max_over_ranks(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """Elementwise maximum of a tensor of any shape over all ranks. It must be on the strategy's device. Collective."""
    return trainer.strategy.reduce(tensor, reduce_op=dist.ReduceOp.MAX)  # type: ignore[return-value, arg-type]


def tokenizer_of(module: pl.LightningModule) -> Any:
    """The module's tokenizer, or None."""
    return module.tokenizer_or_none if isinstance(module, Objective) else getattr(module, "tokenizer", None)


def tower_work(trainer: pl.Trainer) -> TowerWork | None:
    """What counts the FLOPs of this rank's towers from now on; None if it has none.

    Sums over ranks count what the ranks of a row share once for each of them. Of a pipeline's stages one has the tower.
    """
    towers = towers_of(trained_model(trainer))
    if not towers:
        return None
    dims = getattr(trainer.strategy, "dims", None)
    work = TowerWork(towers, times=1 if dims is None else dims.pp)
    work.attach()
    return work
