"""Lightning's checkpoint hooks, routed to this project's sharded checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from torch import nn
from torch.optim import Optimizer

from automodel_trainer.checkpoint import load_checkpoint, remove_checkpoint, save_checkpoint
from automodel_trainer.distributed.phase import during_phase
from automodel_trainer.strategies.base.processes import MeshProcesses


class SavingStrategy(MeshProcesses):
    """Saves and loads checkpoints as folders of safetensors and JSON. Lightning makes no files or copies of its own.

    Attributes:
        on_read: called with what was read of a checkpoint; it may change it before Lightning restores it.
    """

    on_read: Callable[[dict[str, Any]], None] | None = None

    @property
    @abstractmethod
    def trained_module(self) -> nn.Module:
        """The module whose parameter names the checkpoint uses."""

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Lightning's plugin, which this strategy does not use. Assigning one raises ValueError."""
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        # A plugin would silently do nothing, so refuse it.
        raise ValueError(
            f"{type(io).__name__} was given as a plugin, but {type(self).__name__} writes its own checkpoint folders. "
            "Remove the plugin. DCPCheckpoint can save asynchronously and to object storage."
        )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights are read into shards, so the model must be laid out first."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False: `load_checkpoint` has read the optimizer state into its shards already."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: `save_checkpoint` writes the shards, so Lightning needs no second copy."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty, for the same reason."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """A no-op: `load_checkpoint` has read the weights into their shards already."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder: safetensors under Hugging Face names, and JSON. Collective.

        Args:
            checkpoint: Lightning's state of loops, callbacks and schedules.
            filepath: the folder to write.
            storage_options: a function to call instead of `checkpoint.save_checkpoint`, with the same arguments.
        """
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []  # missing if weights_only=True
        with during_phase("save"):
            save = storage_options or save_checkpoint
            save(Path(filepath), checkpoint, self.trained_module, optimizers)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint folder, written under any layout, into this layout's shards. Collective.

        Raises:
            ValueError: the checkpoint is damaged, or does not fit the model or its optimizers.
        """
        with during_phase("load"):
            checkpoint = load_checkpoint(Path(checkpoint_path), self.trained_module, self.optimizers)
        if self.on_read is not None:
            self.on_read(checkpoint)
        return checkpoint

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint folder. Rank 0 does it."""
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))
