"""DDP: every rank holds the whole model; gradients are all-reduced in buckets while backward runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, Precision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from automodel_trainer._lightning import DDPForwardRedirection, prepare_for_backward
from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.nn.tiles import Count
from automodel_trainer.strategies.base.activation_checkpointing import Mode
from automodel_trainer.strategies.base.block_modes import check_modes
from automodel_trainer.strategies.base.budget import Budget, Memory
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy, Objective
from automodel_trainer.strategies.base.precision import MeshPrecision
from automodel_trainer.strategies.data_parallel._ddp import remove_hooks
from automodel_trainer.strategies.data_parallel.plain_ddp import AverageAfterBackward


class DDPStrategy(MeshStrategy):
    """Replicate the model and split the data. On one device nothing is wrapped.

    `precision="bf16"` means autocast over fp32 weights, as in Lightning.

    Args:
        activation_checkpointing: "full", "selective" or "offload"; see `FSDP2Strategy`.
        tiled_mlp, memory: see `FSDP2Strategy`.
        find_unused_parameters: allow parameters that a step does not use (costs a walk over the graph).
        bucket_cap_mb: size of a gradient bucket, in MiB.
        compile, compile_backend, compile_options, launcher, process_group_backend, timeout: see `MeshStrategy`.

    Source: torch.nn.parallel.DistributedDataParallel; arXiv 2006.15704.
    """

    def __init__(
        self,
        *,
        activation_checkpointing: Mode | str | None = None,
        tiled_mlp: Count | Literal[False] = False,
        memory: Memory = None,
        find_unused_parameters: bool = False,
        bucket_cap_mb: int = 25,
        **kwargs: Any,
    ) -> None:
        check_modes(activation_checkpointing)
        super().__init__(ParallelDims(dp_replicate=1, dp_shard=-1), **kwargs)
        self._forward_redirection = DDPForwardRedirection()
        self.activation_checkpointing = activation_checkpointing
        self.tiled_mlp = tiled_mlp
        self.memory = Budget.of(memory, activation_checkpointing, tiled_mlp)
        self.ddp_options: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters,
            "bucket_cap_mb": bucket_cap_mb,
        }
        self._wrapped: DistributedDataParallel | None = None
        self._trained: list[bool] = []  # which parameters were trained when DDP was told of them
        self._plain: list[AverageAfterBackward] = []

    def convert_precision(self, plugin: Precision) -> Precision:
        """Keep Lightning's plugin (autocast), unless the whole model is held in one dtype ("bf16-true", "64-true").

        Raises:
            ValueError: the precision is not supported.
        """
        plugin = super().convert_precision(plugin)
        whole = isinstance(plugin, (HalfPrecision, DoublePrecision))
        return MeshPrecision(str(plugin.precision)) if whole else plugin

    @property
    def blocks_run_alone(self) -> bool:
        """Always: every rank has whole blocks."""
        return True

    @property
    def needs_every_gradient(self) -> bool:  # type: ignore[override]
        """DDP waits for the gradient of every parameter, unless it searches for those that have none."""
        return self.dp_size > 1 and not self.ddp_options["find_unused_parameters"]

    @property
    def gradient_scale(self) -> float:
        """The number of ranks: DDP averages over them, and an objective needs the sum."""
        return float(self.dp_size)

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Checkpoint and compile the blocks of `model`, in place. `layout` wraps it in DDP later.

        Raises:
            ValueError: the model has no blocks, or this run cannot compile.
        """
        text, later = self.block_modes, self.memory is not None
        if self.tiles is not None or later:
            self.prepared.find_mlps(model)
        if text is not None or later:
            self.prepared.set_modes(model, text, self.checkpoints_inside)
        self.prepared.checkpoint(model, inside=True, always=later)
        self.compile_model(model)
        self.tile_mlps()
        self.prepared.checkpoint(model, inside=False, always=later)  # around compiled blocks, which tiles cut
        self.prepared.offload(model, self.num_processes, self.blocks_run_alone, always=later)
        return model  # wrapped in `layout`: DDP needs real parameters

    def finalize_parameters(self, model: nn.Module) -> None:
        """Average the gradients of a model that a user's own loop calls. A Trainer wraps the model instead."""
        if self.dp_size > 1 and self.lightning_module is None:
            self._plain.append(AverageAfterBackward(model))

    def layout(self, module: pl.LightningModule) -> None:
        """Move the module to its device and wrap an objective's model, or a user's whole module, in DDP."""
        if not isinstance(module, Objective):
            self.parallelize(module)
        self.model_to_device()
        if isinstance(module, Objective):
            self.tell_laid_out(module)
        # DDP refuses a module that has nothing to train
        if self.dp_size == 1 or not any(p.requires_grad for p in module.parameters()):
            return
        self._wrap_module(module)

    def _wrap_module(self, module: pl.LightningModule) -> None:
        if isinstance(module, Objective):
            self._wrapped = self._wrap(module.model)
        else:
            self.model = self._wrap(module)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Wrap again if parameters have been frozen or unfrozen since, as by `BaseFinetuning`: DDP would not see it."""
        wrapped, module = self._wrapped or self.model, self.lightning_module
        if not isinstance(wrapped, DistributedDataParallel) or module is None:
            return
        if [p.requires_grad for p in wrapped.module.parameters()] != self._trained:
            remove_hooks(wrapped)
            self._wrap_module(module)

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        while self._plain:
            self._plain.pop().remove()
        self._trained = [parameter.requires_grad for parameter in module.parameters()]
        device_ids = [self.root_device.index] if self.root_device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, **self.ddp_options)

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """See `StepRunner.forward`."""
        # Evaluation uses the plain model: DDP's buffers and buckets serve backward only.
        wrapped = self._wrapped if self._wrapped is not None and model.training else model
        # DDP searches the graph of the outputs for unused parameters. Deferred logits would hide the head from it.
        if self.ddp_options["find_unused_parameters"]:
            return wrapped(**inputs)
        return super().forward(wrapped, inputs)

    def gradient_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See `StepRunner.gradient_sync`."""
        return nullcontext() if last or self._wrapped is None else self._wrapped.no_sync()

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Tell DDP's reducer about a backward that a user's module with manual optimization calls itself.

        Args:
            closure_loss: the loss, 0-dim.
        """
        module = self.lightning_module
        if isinstance(self.model, DistributedDataParallel) and module is not None and not module.automatic_optimization:
            prepare_for_backward(self.model, closure_loss)

    def forget_interrupted(self, model: nn.Module) -> None:
        """See `MeshStrategy.forget_interrupted`. DDP would wait for the gradients that were left out."""
        if self._wrapped is not None:
            remove_hooks(self._wrapped)
            self._wrapped = self._wrap(model)

    def forget_run(self) -> None:
        """See `MeshStrategy.forget_run`."""
        super().forget_run()
        self._wrapped = None
        self._plain = []

    def teardown(self) -> None:
        """Unwrap the module, then tear down as usual."""
        self._wrapped = None
        self.model = self.lightning_module
        super().teardown()
