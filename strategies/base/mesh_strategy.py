"""MeshStrategy: the contract between the Trainer, an objective and a layout. One class is one layout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from automodel_trainer._lightning import as_automatic, forget_optimizers, synchronize_layers
from automodel_trainer.checkpoint.given import note_given
from automodel_trainer.distributed.mesh import DATA_AXES, ParallelDims
from automodel_trainer.models.record import record_of
from automodel_trainer.models.stage_names import pipeline_of
from automodel_trainer.nn.tiles import Count
from automodel_trainer.strategies.base._transformers_marks import mark_as_sharded
from automodel_trainer.strategies.base.activation_checkpointing import Checkpointed, checkpoint_when_asked
from automodel_trainer.strategies.base.averaging import check_users_module
from automodel_trainer.strategies.base.block_modes import Mode, modes_of_blocks, uses
from automodel_trainer.strategies.base.budget import Budget, Chosen
from automodel_trainer.strategies.base.compile import compiler_imported, wants_compile
from automodel_trainer.strategies.base.objective import MicroBatch, Objective, Part, count_all
from automodel_trainer.strategies.base.precision import MeshPrecision
from automodel_trainer.strategies.base.processes import Launcher
from automodel_trainer.strategies.base.saving import SavingStrategy
from automodel_trainer.strategies.base.step import StepRunner
from automodel_trainer.strategies.base.user_module import PreparedBlocks

__all__ = ["MeshStrategy", "MicroBatch", "Objective", "Part"]


class MeshStrategy(StepRunner, SavingStrategy):
    """A layout of a model on a DeviceMesh.

    It has three jobs, one file each: processes and the mesh (`processes.py`), the layout (here), and running a step
    (`step.py`). A subclass must implement `parallelize`, which lays a model out. It may override any other member that
    is not final; ARCHITECTURE.md lists them.

    Args:
        dims: sizes of the mesh axes.
        launcher: how `devices=N` starts its processes if torchrun or srun did not. `subprocess` runs the script again;
            `fork` and `spawn` run `fit` in worker processes, as a notebook needs it; `auto` chooses.
        compile: run every block as one compiled function in training. "auto" compiles on a GPU; in a user's own
            LightningModule it compiles only the blocks of Hugging Face models.
        compile_backend: passed to `torch.compile`.
        compile_options: passed to `torch.compile`; None: `{"use_fast_math": True}` for the inductor (see
            `compile_blocks`).
        process_group_backend: None: gloo on CPU; on CUDA NCCL, with gloo for CPU tensors.
        timeout: how long a collective waits for a missing rank.
    """

    def __init__(
        self,
        dims: ParallelDims,
        *,
        compile: bool | Literal["auto"] = "auto",
        compile_backend: str = "inductor",
        compile_options: dict[str, Any] | None = None,
        launcher: Launcher = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(dims, launcher, process_group_backend, timeout)
        self.compile, self.compile_backend, self.compile_options = compile, compile_backend, compile_options
        self.prepared = PreparedBlocks()
        self._sets_up_training = False
        self.chosen: Chosen | None = None  # by the budget, for this run

    def __repr__(self) -> str:
        """What Lightning's Fabric prints when it refuses a strategy that is not one of its own."""
        name = type(self).__name__
        return (
            f"{name}(…) of automodel_trainer, which lays models out for a Trainer or a loop of your own and not for "
            f"Fabric: call {name}(…).start(), load the model with AutoModelForCausalLM.from_pretrained(folder, "
            "strategy), and run the loop without Fabric (docs/own_loop.md)"
        )

    memory: Budget | None = None

    def ineffective_options(self) -> list[str]:
        """See `MeshProcesses.ineffective_options`."""
        alone = self.memory is not None and self.lightning_module is None
        return [f"memory={self.memory.given!r} outside of a Trainer's fit"] if alone else []  # type: ignore[union-attr]

    # --- the contract: what a layout defines --------------------------------------------------------------------------

    @abstractmethod
    def parallelize(self, model: nn.Module) -> nn.Module:
        """Lay `model` out on the mesh, in place. It is on meta, or real. A second call is a no-op.

        Raises:
            ValueError: this layout does not fit the model.
        """

    def finalize_parameters(self, model: nn.Module) -> None:
        """Move the parameters of a laid-out model to where this layout keeps them. Called once they have values."""

    def lay_out_user_module(self, module: pl.LightningModule) -> None:
        """Lay out the parts of a user's own LightningModule, which calls its models itself.

        Raises:
            ValueError: this layout must run the step itself, so it cannot train such a module.
        """
        raise ValueError(
            f"{type(self).__name__} runs CausalLMModule, or any module with `model`, `split` and `loss`; "
            f"{type(module).__name__} calls its model itself. Use strategy='fsdp2' or 'ddp'."
        )

    @property
    def min_layers(self) -> int:
        """The smallest number of layers that this layout can split."""
        return 1

    @property
    def min_micro_batches(self) -> int:
        """The smallest number of micro-batches that an optimizer step needs."""
        return 1

    @property
    def expert_ranks(self) -> int | Literal["auto"]:
        """The number of ranks that the experts of a layer are split over. They are borrowed from the mesh's axes."""
        return 1

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled.

        Raises:
            ValueError: `compile` is unknown, or it is True and this run cannot compile.
        """
        return wants_compile(self.compile, self.compile_backend, self.root_device)

    @final
    def tell_transformers(self, model: PreTrainedModel) -> None:
        """Let transformers' Trainer and TRL's know that `model` is sharded, so that they neither wrap nor move it.

        A replicated model is none of their business: they may wrap it in DDP.
        """
        sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        if self.world_size > 1 and (sharded or pipeline_of(model) is not None):
            mark_as_sharded(model, self.dims)
        if self.dims.tp * self.dims.cp > 1:
            checkpoint_when_asked(model)
            if self.block_modes is not None or self.memory is not None:
                record_of(model).keep(Checkpointed())

    def take_gradients(self, objective: Objective, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor] | None:
        """Count the tokens of a global batch, and run forward and backward of it. Collective.

        Args:
            objective: the module to train.
            micro_batches: this rank's share of the global batch.

        Returns:
            the loss, as `forward_backward` returns it, and the number of supervised tokens in the global batch. None
            if the optimizer must not step: the model has the state after this step already.
        """
        tokens = self._sum_over(DATA_AXES, count_all(objective, micro_batches))
        return self.forward_backward(objective, micro_batches, tokens), tokens

    # --- helpers for layouts ------------------------------------------------------------------------------------------

    @final
    def compile_model(self, model: nn.Module) -> None:
        """Compile the blocks of `model` if this run compiles. Call it before anything is sharded.

        Raises:
            ValueError: `compile=True` and the model has no blocks, or this run cannot compile.
        """
        if self.compiles:
            self.prepared.compile(model, self.compile_backend, self.compile_options, self.compile)

    @final
    def beside_loading(self) -> AbstractContextManager[None]:
        """A context that reads weights. If this run is going to compile by the inductor, it is imported meanwhile."""
        return compiler_imported(self.compiles and self.compile_backend == "inductor")

    @final
    def tile_mlps(self) -> None:
        """Compute the MLPs that `prepared` has found in tiles, if this run does. Call it once they are cut.

        Raises:
            ValueError: see `PreparedBlocks.tile`.
        """
        if (count := self.tiles) is not None:
            self.prepared.tile(count, self.compile_backend if self.compiles else None, self.compile_options)

    @property
    @final
    def tiles(self) -> Count | None:
        """The number of tiles that MLPs are computed in; "auto": tiles of 8,192 tokens. None: they are not tiled.

        Raises:
            ValueError: `tiled_mlp` is unknown, or it cannot be with this activation checkpointing.
        """
        if self.chosen is not None:
            return self.chosen.tiles
        asked, modes = getattr(self, "tiled_mlp", False), self.block_modes
        if asked != "auto" and (isinstance(asked, str) or (asked is not False and asked < 2)):
            raise ValueError(f"tiled_mlp={asked!r} is unknown. Allowed: auto, a number of tiles from 2 on, or false.")
        if asked is False or (asked == "auto" and not uses(modes, "full", "offload")):
            return None
        if uses(modes, "selective") and self.compiles:
            raise ValueError(
                f"activation_checkpointing={modes!r} needs compiled blocks in one piece, and tiled_mlp={asked} cuts "
                "them. Set activation_checkpointing='full' or 'offload', or compile=False."
            )
        return asked  # type: ignore[no-any-return]

    @property
    @final
    def block_modes(self) -> str | None:
        """How blocks keep their activations, as `modes_of_blocks` takes it: asked for, or what the budget chose."""
        return getattr(self, "activation_checkpointing", None) if self.chosen is None else self.chosen.modes

    def checkpoints_inside(self, mode: Mode | None) -> bool:
        """Whether blocks of a mode are checkpointed inside of what is compiled. Tiles cut that, so then it is not."""
        return self.tiles is None

    @property
    def blocks_run_alone(self) -> bool:
        """Whether a block can run at any time by itself: no other rank has to run it at the same time."""
        return self.world_size == 1

    @final
    def choose(self, chosen: Chosen | None) -> None:
        """Let blocks keep their activations as a memory budget has it, from the next step on; None: all of them."""
        before, self.chosen = self.tiles, chosen
        tiles, blocks = self.tiles, list(self.prepared.switches)
        if tiles != before:
            self.prepared.untile()
            self.tile_mlps()
            if self.compiles:
                torch.compiler.reset()  # the compiler does not see that an MLP in a block has another forward
        for block, mode in zip(blocks, modes_of_blocks(self.block_modes, len(blocks))):
            switch = self.prepared.switches[block]
            switch.mode, switch.inside = mode, self.checkpoints_inside(mode)

    def forget_interrupted(self, model: nn.Module) -> None:
        """Let `model` take another step after one whose forward or backward has raised an error."""

    # --- what Lightning calls ---------------------------------------------------------------------------------------

    @property
    @final
    def trained_module(self) -> nn.Module:
        """The module whose parameter names are the checkpoint's: an objective's model, or a user's LightningModule."""
        module = self.lightning_module
        assert module is not None
        return module.model if isinstance(module, Objective) else module

    def setup(self, trainer: pl.Trainer) -> None:
        """Lay the module out, then create its optimizers: they must hold the parameters of the final layout.

        Raises:
            ValueError: this layout does not fit the model.
        """
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._sets_up_training = trainer.state.fn == TrainerFn.FITTING
        self._convert(self.lightning_module, training=self._sets_up_training)
        self.layout(self.lightning_module)
        if self._sets_up_training:
            forget_optimizers(self)
            objective = isinstance(self.lightning_module, Objective)
            with as_automatic(self.lightning_module) if objective else nullcontext():
                self.setup_optimizers(trainer)
            note_given(self.optimizers, [config.scheduler for config in self.lr_scheduler_configs])
        self.setup_precision_plugin()

    def _convert(self, module: pl.LightningModule, training: bool) -> None:
        """Apply the Trainer's options to a user's own module: its dtype, and synchronised batch norms."""
        if training and self.world_size > 1:
            synchronize_layers(self, module)
        if isinstance(self.precision_plugin, MeshPrecision) and not isinstance(module, Objective):
            self.precision_plugin.convert_own(module, self.root_device)

    def layout(self, module: pl.LightningModule) -> None:
        """Lay out the parts of `module` that `configure_model` has not laid out yet.

        Raises:
            ValueError: this layout does not fit the model.
        """
        if isinstance(module, Objective):
            self.parallelize(module.model)
            self.tell_laid_out(module)
        else:
            self.lay_out_user_module(module)
            if self._sets_up_training:
                check_users_module(module)

    @final
    def tell_laid_out(self, module: Objective) -> None:
        """Tell an objective that a Trainer is going to train that its model is laid out."""
        if self._sets_up_training:
            module.laid_out(self)

    def model_to_device(self) -> None:
        """Move the whole LightningModule to this rank's device."""
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch to the device. The objective may look at it before that."""
        if isinstance(self.lightning_module, Objective):
            self.lightning_module.check_batch(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def forget_run(self) -> None:
        """Release the processes, the mesh and the model. The requested layout remains, ready for another run."""
        super().forget_run()
        self.prepared, self.chosen = PreparedBlocks(), None
