"""How Lightning's checkpointing reaches ours: through the strategy, which knows the module and the optimizers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from torch import nn
from torch.optim import Optimizer

from automodel_trainer.checkpoint import load_checkpoint, remove_checkpoint, save_checkpoint
from automodel_trainer.distributed.phase import during_phase
from automodel_trainer.strategies.base.processes import MeshProcesses


class SavingStrategy(MeshProcesses):
    """Checkpoints are folders of sharded safetensors and JSON; Lightning makes no files and copies of its own."""

    @property
    @abstractmethod
    def trained_module(self) -> nn.Module:
        """The module whose parameter names are the checkpoint's."""

    @property
    def checkpoint_io(self) -> CheckpointIO:
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        raise ValueError(
            f"{type(io).__name__} was given as a plugin, but {type(self).__name__} writes its checkpoints, folders of "
            "shards, itself. Leave the plugin out; DCPCheckpoint saves asynchronously and to object storage."
        )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False  # `load_checkpoint` reads optimizer state straight into its shards

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` writes the shards; Lightning has no need of a second copy

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has already read the weights into their shards."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder: sharded safetensors under Hugging Face names, and JSON. Collective.

        Args:
            storage_options: what saves in place of `checkpoint.save_checkpoint`, called as that is.
        """
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []  # absent: weights_only=True
        with during_phase("save"):
            save = storage_options or save_checkpoint
            save(Path(filepath), checkpoint, self.trained_module, optimizers)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint folder, whatever layout wrote it, into this layout's shards. Collective."""
        with during_phase("load"):
            return load_checkpoint(Path(checkpoint_path), self.trained_module, self.optimizers)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))
