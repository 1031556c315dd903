"""DDP: the whole model on every rank, gradients all-reduced in buckets while backward runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, Precision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from automodel_trainer._lightning import DDPForwardRedirection, prepare_for_backward
from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy, Objective
from automodel_trainer.strategies.base.precision import MeshPrecision


class DDPStrategy(MeshStrategy):
    """Replicate the model, split the data. On one device nothing is wrapped.

    `precision="bf16"` is autocast over fp32 weights, as Lightning has it.

    Args:
        activation_checkpointing: "full" or "selective", see `FSDP2Strategy`.
        find_unused_parameters: let parameters that take no part in a step pass (costs a walk over the graph).
        bucket_cap_mb: size of a gradient bucket, in MiB.
        compile, compile_backend, compile_options, launcher, process_group_backend, timeout: see `MeshStrategy`.

    Source: torch.nn.parallel.DistributedDataParallel; arXiv 2006.15704.
    """

    def __init__(
        self,
        *,
        activation_checkpointing: Literal["full", "selective"] | None = None,
        find_unused_parameters: bool = False,
        bucket_cap_mb: int = 25,
        **kwargs: Any,
    ) -> None:
        super().__init__(ParallelDims(dp_replicate=1, dp_shard=-1), **kwargs)
        self._forward_redirection = DDPForwardRedirection()
        self.activation_checkpointing = activation_checkpointing
        self.ddp_options: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters,
            "bucket_cap_mb": bucket_cap_mb,
        }
        self._wrapped: DistributedDataParallel | None = None

    def convert_precision(self, plugin: Precision) -> Precision:
        plugin = super().convert_precision(plugin)
        whole = isinstance(plugin, (HalfPrecision, DoublePrecision))
        return MeshPrecision(str(plugin.precision)) if whole else plugin

    @property
    def gradient_scale(self) -> float:
        return float(self.dp_size)  # DDP averages over ranks

    def parallelize(self, model: nn.Module) -> nn.Module:
        if self.activation_checkpointing:
            self.prepared.checkpoint(model, self.activation_checkpointing)
        self.compile_model(model)
        return model  # wrapped in `layout`: DDP needs real parameters

    def layout(self, module: pl.LightningModule) -> None:
        if not isinstance(module, Objective):
            self.parallelize(module)
        self.model_to_device()
        if self.dp_size == 1 or not any(p.requires_grad for p in module.parameters()):
            return
        if isinstance(module, Objective):
            self._wrapped = self._wrap(module.model)
        else:
            self.model = self._wrap(module)

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        device_ids = [self.root_device.index] if self.root_device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, **self.ddp_options)

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        # In evaluation the plain model: DDP's buffers and buckets serve backward only.
        wrapped = self._wrapped if self._wrapped is not None and model.training else model
        if self.ddp_options["find_unused_parameters"]:  # it looks for what the outputs depend on: all must be there
            return wrapped(**inputs)
        return super().forward(wrapped, inputs)

    def gradient_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or self._wrapped is None else self._wrapped.no_sync()

    def pre_backward(self, closure_loss: Tensor) -> None:
        """A user's module with manual optimization calls backward itself: DDP's reducer has to be told."""
        module = self.lightning_module
        if isinstance(self.model, DistributedDataParallel) and module is not None and not module.automatic_optimization:
            prepare_for_backward(self.model, closure_loss)

    def forget_run(self) -> None:
        super().forget_run()
        self._wrapped = None

    def teardown(self) -> None:
        self._wrapped = None
        self.model = self.lightning_module
        super().teardown()
