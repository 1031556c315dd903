"""MemoryBudget: before the first step, choose how blocks keep their activations so that the largest step fits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.nn.device_memory import DeviceMemory, memory_of
from automodel_trainer.strategies import MeshStrategy, Objective
from automodel_trainer.strategies.base.trials import choose_for_budget


class MemoryBudget(Callback):
    """Tries steps of the largest micro-batch that the data can bring, if the strategy has a `memory` budget.

    Args:
        memory: counts the memory of this rank's device; None: torch does.

    Raises:
        ValueError: nothing fits; or this module, layout or data cannot be tried.
    """

    def __init__(self, memory: DeviceMemory | None = None) -> None:
        self._memory = memory
        self._done = False  # for this run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what an earlier run chose, and refuse what cannot be tried."""
        self._done = False
        strategy = trainer.strategy
        if stage != "fit" or not isinstance(strategy, MeshStrategy) or strategy.memory is None:
            return
        given = f"memory={strategy.memory.given!r}"
        if not isinstance(pl_module, Objective):
            raise ValueError(
                f"{given} tries steps of CausalLMModule, or any module with `model`, `split` and `loss`; "
                f"{type(pl_module).__name__} runs its own. Set activation_checkpointing instead."
            )
        strategy.choose(None)

    def before_peers(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any) -> None:
        """Choose now, and not when other replica groups wait for this one.

        Args:
            loader: of the training rows.
        """
        self._choose(trainer, pl_module, loader)
        self._done = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose, if that is not done. The optimizers exist, with their state if the run goes on from a checkpoint."""
        if not self._done:
            self._choose(trainer, pl_module, trainer.train_dataloader)

    def _choose(self, trainer: pl.Trainer, pl_module: Any, loader: Any) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, MeshStrategy) or strategy.memory is None:
            return
        memory = self._memory or memory_of(strategy.root_device)
        if memory is None:
            rank_zero_warn(
                f"memory={strategy.memory.given!r} has no effect on {strategy.root_device.type}, where nobody counts "
                "what tensors take. All activations are kept."
            )
            return
        largest = getattr(loader, "largest_steps", None)
        if largest is None:
            raise ValueError(
                f"memory={strategy.memory.given!r} tries the largest micro-batch, and {type(loader).__name__} cannot "
                "tell it. Give fit a data module of automodel_trainer or a path, or set activation_checkpointing."
            )
        choose_for_budget(strategy, pl_module, largest(), memory)
        if strategy.compiles and not loader.has_one_width:
            torch.compiler.reset()  # else the first steps would run code for rows of any width, as the second does
