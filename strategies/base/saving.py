"""Lightning's checkpoint hooks, routed to this project's sharded checkpoints."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import safetensors.torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from automodel_trainer._lightning import attached_trainer
from automodel_trainer.checkpoint import remove_checkpoint, save_checkpoint
from automodel_trainer.checkpoint.edited_weights import without_base
from automodel_trainer.checkpoint.lightning_file import load_optimizer_states, read_lightning_file
from automodel_trainer.checkpoint.loader_place import Place, can_remember
from automodel_trainer.checkpoint.optimizer import load_optimizers
from automodel_trainer.checkpoint.option_groups import GroupOptions
from automodel_trainer.checkpoint.remote import RemoteRuns, fetch, is_remote, mirror, scratch
from automodel_trainer.checkpoint.rng import set_rng_state
from automodel_trainer.checkpoint.saved_weights import load_state
from automodel_trainer.checkpoint.state import FOLDER_KEY, RNG_KEY, RUN_KEY, open_checkpoint
from automodel_trainer.distributed.agreement import on_all_ranks
from automodel_trainer.distributed.phase import during_phase
from automodel_trainer.strategies.base.objective import Objective
from automodel_trainer.strategies.base.processes import MeshProcesses

UNDER_TRAINING = "current_model_state"  # where Lightning's `WeightAveraging` keeps the weights that are not averaged


class SavingStrategy(MeshProcesses):
    """Saves and loads checkpoints as folders of safetensors and JSON. Lightning makes no files or copies of its own.

    Attributes:
        on_read: called with what was read of a checkpoint; it may change it before Lightning restores it.
        on_optimizers_read: called again once the optimizers exist and have their state, with what their groups had in
            the checkpoint; it may change the schedules'.
    """

    on_read: Callable[[dict[str, Any]], None] | None = None
    on_optimizers_read: Callable[[dict[str, Any], list[list[GroupOptions]]], None] | None = None

    _restores_late: bool | None = None
    _handed: Mapping[str, Any] | None = None
    _places: tuple[Place, ...] = ()

    @property
    @abstractmethod
    def trained_module(self) -> nn.Module:
        """The module whose parameter names the checkpoint uses."""

    @property
    def writes_checkpoints(self) -> bool:
        """Whether these ranks write the checkpoints of the run; other replica groups, if there are any, do not."""
        return True

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

    def connect(self, model: pl.LightningModule) -> None:
        """Take the module of a new run."""
        super().connect(model)
        self._restores_late = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether Lightning restores the module and the callbacks only after `setup`, and so after `on_fit_start`.

        True for a user's module on meta, which gets its parameters in `setup`. All others exist already: an objective's
        model is laid out in `configure_model`.
        """
        if self._restores_late is None:  # Lightning asks before and after `setup`, and the answer must not change
            module = self.lightning_module
            assert module is not None
            self._restores_late = any(parameter.is_meta for parameter in module.parameters())
        return self._restores_late

    def process_dataloader(self, dataloader: Any) -> Any:
        """Let a user's training loader remember its place in the epoch, until `teardown`."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.training and can_remember(dataloader):
            progress = trainer.fit_loop.epoch_loop.batch_progress

            def taken() -> int:
                alone = trainer.train_dataloader is dataloader  # beside others it may have been through its rows before
                return progress.current.ready if alone and not progress.is_last_batch else 0

            self._places += (Place(dataloader, taken, (self.dp_rank, self.dp_size)),)  # type: ignore[attr-defined]
            # Workers build batches before Lightning tells the sampler the epoch.
            set_epoch = getattr(getattr(dataloader, "sampler", None), "set_epoch", None)
            if callable(set_epoch):
                epoch: Any = trainer.fit_loop.epoch_progress.current
                set_epoch(epoch.processed)
        return dataloader

    def teardown(self) -> None:
        """Leave the user's loaders as they were."""
        for place in self._places:
            place.forget()
        self._places = ()
        super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights as `on_save_checkpoint` hooks see them: this rank's tensors, sharded as they are."""
        self._handed = self.trained_module.state_dict()
        return dict(self._handed)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty: `save_checkpoint` writes the shards, so Lightning needs no second copy."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder: safetensors under Hugging Face names, and JSON. Collective.

        If a hook has changed `checkpoint["state_dict"]`, what it left there is written.

        Args:
            checkpoint: Lightning's state of loops, callbacks and schedules.
            filepath: the folder to write, or a URL of object storage.
            storage_options: a function to call instead of `checkpoint.save_checkpoint`, with the same arguments.

        Raises:
            TypeError: `storage_options` is something else.
        """
        if storage_options is not None and not callable(storage_options):
            raise TypeError(
                "`Trainer.save_checkpoint(..., storage_options=...)` with `storage_options` arg is not supported for "
                f"{type(self).__name__}. Credentials and endpoint come from the store's own environment variables."
            )
        checkpoint = {**checkpoint, "state_dict": self._edited(checkpoint.get("state_dict"))}
        if UNDER_TRAINING in checkpoint:
            checkpoint[UNDER_TRAINING] = without_base(self.trained_module, checkpoint[UNDER_TRAINING])
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []  # missing if weights_only=True
        save: Callable[..., None] = storage_options or save_checkpoint
        with during_phase("save"):
            if not is_remote(filepath):
                save(Path(filepath), checkpoint, self.trained_module, optimizers)
                return
            store, name = _store_and_name(filepath)
            local = scratch(store) / name
            save(local, checkpoint, self.trained_module, optimizers, mirror=partial(mirror, RemoteRuns(store), ""))
            on_all_ranks(lambda: remove_checkpoint(local) if self.is_global_zero else None, local)

    def _edited(self, state: Any) -> Mapping[str, Any]:
        """What a hook made of the weights that it was shown; empty if it left them alone."""
        handed, self._handed = self._handed, None
        if state is None or handed is None:
            return {}
        same = state.keys() == handed.keys() and all(state[name] is handed[name] for name in handed)
        return {} if same else state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Check and open a checkpoint folder, written under any layout, or read a `.ckpt` of Lightning's. Collective.

        `load_model_state_dict` and `load_optimizer_state_dict` read the weights and the optimizer state.

        Args:
            checkpoint_path: the folder or file, or the URL of a folder.
            weights_only: has no effect: nothing but tensors and plain values is ever read.

        Raises:
            ValueError: the checkpoint is damaged, or it is a file that holds other objects, or a run is to go on from
                weights alone.
        """
        with during_phase("load"):
            path = fetch(str(checkpoint_path), scratch(str(checkpoint_path))) if is_remote(checkpoint_path) else None
            path = path or Path(checkpoint_path)
            checkpoint = (
                on_all_ranks(lambda: read_lightning_file(path), path) if path.is_file() else open_checkpoint(path)
            )
        trainer = attached_trainer(self.lightning_module)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and "optimizer_states" not in checkpoint:
            raise ValueError(
                f"{path} was saved with weights_only=True: the checkpoint contains only the model, and training cannot "
                "go on from it. Give it as the model (its model/ folder) to start a new run from these weights."
            )
        if self.on_read is not None:
            self.on_read(checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of a checkpoint, with what hooks changed in them, into this layout. Collective.

        Raises:
            ValueError: the weights do not fit the module.
        """
        module = self.trained_module
        own = not isinstance(self.lightning_module, Objective)
        whole = own and not any(isinstance(parameter, DTensor) for parameter in module.parameters())
        with during_phase("load"):
            place = checkpoint.get(FOLDER_KEY, "the checkpoint")
            on_all_ranks(lambda: load_state(module, checkpoint["state_dict"], strict, whole), place)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer state of a checkpoint into its shards, and set the random generators. Collective.

        Raises:
            ValueError: the run has other optimizers.
        """
        with during_phase("load"):
            folder = checkpoint.get(FOLDER_KEY)
            if folder is None:
                load_optimizer_states(self.optimizers, checkpoint["optimizer_states"])
                return
            place, given = Path(folder) / "optimizer", checkpoint.get(RUN_KEY, {}).get("optimizers")
            groups: list[list[GroupOptions]] = []
            if self.optimizers:
                load = partial(load_optimizers, self.trained_module, self.optimizers, place, given)
                groups = on_all_ranks(load, folder)
            set_rng_state(checkpoint[RNG_KEY])  # hooks may have drawn random numbers since the checkpoint was opened
        if self.on_optimizers_read is not None:
            assert isinstance(checkpoint, dict)
            self.on_optimizers_read(checkpoint, groups)

    @final
    def whole_weights(self) -> bytes | None:
        """The weights of a user's module in the safetensors format; None if they are sharded, or an objective's."""
        module = self.lightning_module
        assert module is not None
        state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        if isinstance(module, Objective) or any(isinstance(value, DTensor) for value in state.values()):
            return None
        return safetensors.torch.save({name: value.detach().cpu().clone() for name, value in state.items()})

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint folder, local or in object storage. Rank 0 does it."""
        if not self.is_global_zero:
            return
        if is_remote(filepath):
            store, name = _store_and_name(filepath)
            RemoteRuns(store).withdraw("", name)
        elif os.path.isfile(filepath):  # another program's .ckpt
            os.remove(filepath)
        else:
            remove_checkpoint(Path(filepath))


def _store_and_name(url: str | Path) -> tuple[str, str]:
    store, _, name = str(url).rstrip("/").rpartition("/")
    return store, name
