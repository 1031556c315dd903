"""MeshStrategy: what the Trainer, an objective and a layout expect of each other. One class is one layout."""

from __future__ import annotations

from abc import abstractmethod
from datetime import timedelta
from typing import Any, Literal, final

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.strategies.base.compile import wants_compile
from automodel_trainer.strategies.base.objective import MicroBatch, Objective, Part
from automodel_trainer.strategies.base.precision import MeshPrecision
from automodel_trainer.strategies.base.processes import Launcher
from automodel_trainer.strategies.base.saving import SavingStrategy
from automodel_trainer.strategies.base.step import StepRunner
from automodel_trainer.strategies.base.user_module import PreparedBlocks

__all__ = ["MeshStrategy", "MicroBatch", "Objective", "Part"]


class MeshStrategy(StepRunner, SavingStrategy):
    """A layout of a model on a DeviceMesh.

    It has three jobs, each in a file: processes and the mesh (`processes.py`), the layout (here), and running a step
    (`step.py`). A subclass must say how a model is laid out: `parallelize`. It may override whatever else is not
    final; ARCHITECTURE.md lists those members.

    Args:
        dims: sizes of the mesh axes.
        launcher: how `devices=N` starts its processes where torchrun or srun did not: `subprocess` runs the script
            again, `fork` and `spawn` run `fit` in worker processes, as a notebook needs it; `auto` tells by itself.
        compile: run every block as one compiled function in training. "auto": where there is a GPU (of a user's
            own LightningModule: the blocks of Hugging Face models).
        compile_backend: of `torch.compile`.
        compile_options: of `torch.compile`; None: `{"use_fast_math": True}` for its "inductor" (see `compile_blocks`).
        process_group_backend: defaults to gloo on CPU, and to NCCL with gloo beside it for CPU tensors on CUDA.
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

    # --- the contract: what a layout says ---------------------------------------------------------------------------

    @abstractmethod
    def parallelize(self, model: nn.Module) -> nn.Module:
        """Lay `model` (on meta, or real and equal on all ranks) out on the mesh, in place. Idempotent.

        Raises:
            ValueError: this layout does not fit the model.
        """

    def finalize_parameters(self, model: nn.Module) -> None:
        """Called once the parameters of a laid-out model have their values: put them where this layout keeps them."""

    def lay_out_user_module(self, module: pl.LightningModule) -> None:
        """Lay out the parts of a user's own LightningModule, which calls its models itself.

        Raises:
            ValueError: this layout has to run the step itself.
        """
        raise ValueError(
            f"{type(self).__name__} runs CausalLMModule, or any module with `model`, `split` and `loss`; "
            f"{type(module).__name__} calls its model itself. Use strategy='fsdp2' or 'ddp'."
        )

    @property
    def min_layers(self) -> int:
        """The least number of layers that a model needs to be laid out."""
        return 1

    @property
    def min_micro_batches(self) -> int:
        """The least number of micro-batches that an optimizer step needs."""
        return 1

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled; ValueError where they cannot be."""
        return wants_compile(self.compile, self.compile_backend, self.root_device)

    # --- what layouts are made with ---------------------------------------------------------------------------------

    @final
    def compile_model(self, model: nn.Module) -> None:
        """Compile the blocks of `model` if this run compiles. Call it before anything is sharded."""
        if self.compiles:
            self.prepared.compile(model, self.compile_backend, self.compile_options, self.compile)

    # --- what Lightning calls ---------------------------------------------------------------------------------------

    @property
    @final
    def trained_module(self) -> nn.Module:
        """The module whose parameter names are the checkpoint's: an objective's model, or a user's LightningModule."""
        module = self.lightning_module
        assert module is not None
        return module.model if isinstance(module, Objective) else module

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._convert(self.lightning_module, training=trainer.state.fn == TrainerFn.FITTING)
        self.layout(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _convert(self, module: pl.LightningModule, training: bool) -> None:
        """What the Trainer was asked to make of a user's own module: another dtype, synchronised batch norms."""
        if training and self._layer_sync is not None and self.world_size > 1:
            self._layer_sync.apply(module)
        if isinstance(self.precision_plugin, MeshPrecision) and not isinstance(module, Objective):
            self.precision_plugin.convert_own(module)

    def layout(self, module: pl.LightningModule) -> None:
        """Lay out what `configure_model` has not laid out already."""
        if isinstance(module, Objective):
            self.parallelize(module.model)
        else:
            self.lay_out_user_module(module)

    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)

    def forget_run(self) -> None:
        """Let go of processes, mesh and model. What is left is the layout as it was asked for."""
        super().forget_run()
        self.prepared = PreparedBlocks()
