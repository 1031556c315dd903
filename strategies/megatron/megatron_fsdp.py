"""Megatron-FSDP: NVIDIA's fully sharded data parallel in flat buffers, ZeRO stages 0 to 3 (package megatron-fsdp)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import Precision
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from automodel_trainer.models.quantization.quantize import quantized_weights
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.strategies.base.mesh_strategy import MicroBatch, Objective
from automodel_trainer.strategies.context.attention import CPAttention
from automodel_trainer.strategies.data_parallel.fsdp2 import FSDP2Strategy
from automodel_trainer.strategies.megatron import _megatron_fsdp as mfsdp
from automodel_trainer.strategies.megatron.even_shards import stage

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Dtype = Literal["auto", "fp32", "bf16"]


class MegatronFSDPStrategy(FSDP2Strategy):
    """The mesh, tensor, sequence and context parallel of `FSDP2Strategy`, sharded by Megatron-FSDP. NVIDIA GPUs only.

    A block of the model is a unit. Sharding also covers the ranks of context parallel.

    When to pick which: `fsdp2` is part of torch, runs on any device, offloads to the CPU, trains 4-bit weights and any
    LightningModule. `megatron_fsdp` has ZeRO-1 and ZeRO-2 (no gathering of parameters before every block, for the
    price of their memory), shards optimizer state over replicas too (`dp_replicate` > 1), lays parameters in flat
    buffers that need no copy around a collective, and can register these with NCCL. Checkpoints are the same: train
    under one, go on under the other.

    Args:
        zero_stage: what is sharded. 1: optimizer state and main weights; 2: gradients too; 3: parameters too; 0: none.
        dp_shard, dp_replicate, cp, cp_attention, tp, tp_plan, sequence_parallel, async_tp, activation_checkpointing:
            see `FSDP2Strategy`.
        outer_zero_stage: with `dp_replicate` > 1: 1 shards optimizer state over the replicas as well, 0 does not. None:
            1 at `zero_stage=3`, which alone offers it.
        overlap_grad_reduce: reduce gradients while backward runs. False only at stages 0 and 1.
        overlap_param_gather: gather parameters ahead of their block. False only at stages 1 and 2.
        double_buffer: gather into two buffers that are kept, instead of allocating.
        nccl_ub: register buffers with NCCL (needs megatron-core's or apex's allocator; implies `double_buffer`).
        grad_reduce_dtype: that gradients travel in. auto: fp32.
        main_params_dtype: of the weights that the optimizer updates. auto: what the Trainer's precision says.
        compile, compile_backend, compile_options, launcher, process_group_backend, timeout: see `MeshStrategy`.

    Source: Megatron-LM, megatron/core/distributed/fsdp; ZeRO, arXiv 1910.02054.

    Raises:
        ValueError: options that exclude each other.
    """

    def __init__(
        self,
        zero_stage: Literal[0, 1, 2, 3] = 3,
        dp_shard: int = -1,
        dp_replicate: int = 1,
        *,
        outer_zero_stage: Literal[0, 1] | None = None,
        overlap_grad_reduce: bool = True,
        overlap_param_gather: bool = True,
        double_buffer: bool = False,
        nccl_ub: bool = False,
        grad_reduce_dtype: Dtype = "auto",
        main_params_dtype: Dtype = "auto",
        cp: int | Literal["auto"] = 1,
        cp_attention: CPAttention = "auto",
        tp: int | Literal["auto"] = 1,
        tp_plan: Mapping[str, str] | None = None,
        sequence_parallel: bool = True,
        async_tp: bool = False,
        activation_checkpointing: Literal["full", "selective"] | None = None,
        compile: bool | Literal["auto"] = "auto",
        compile_backend: str = "inductor",
        compile_options: dict[str, Any] | None = None,
        launcher: Literal["auto", "subprocess", "fork", "spawn"] = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            dp_shard,
            dp_replicate,
            cp=cp,
            cp_attention=cp_attention,
            tp=tp,
            tp_plan=tp_plan,
            sequence_parallel=sequence_parallel,
            async_tp=async_tp,
            activation_checkpointing=activation_checkpointing,
            compile=compile,
            compile_backend=compile_backend,
            compile_options=compile_options,
            launcher=launcher,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if outer_zero_stage is None:
            outer_zero_stage = 1 if zero_stage == 3 and dp_replicate > 1 else 0
        self.zero_stage = zero_stage
        self.outer_zero_stage = outer_zero_stage
        self.overlap_grad_reduce = overlap_grad_reduce
        self.overlap_param_gather = overlap_param_gather
        self.double_buffer = double_buffer
        self.nccl_ub = nccl_ub
        self.grad_reduce_dtype = grad_reduce_dtype
        self.main_params_dtype = main_params_dtype
        self._in_step = False
        self._buffer_mesh: DeviceMesh | None = None
        self._check_options()

    def _check_options(self) -> None:
        stage, replicas = self.zero_stage, self.requested_dims.dp_replicate
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage={stage} is unknown. Allowed: 0, 1, 2, 3.")
        if self.outer_zero_stage not in (0, 1):
            raise ValueError(f"outer_zero_stage={self.outer_zero_stage} is unknown. Allowed: 0, 1.")
        for name in ("grad_reduce_dtype", "main_params_dtype"):
            if getattr(self, name) not in ("auto", *_DTYPES):
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Allowed: auto, {', '.join(_DTYPES)}.")
        if self.outer_zero_stage and (stage != 3 or replicas == 1):
            raise ValueError(
                "outer_zero_stage=1 shards optimizer state over replicas of a sharded model: it needs zero_stage=3 and "
                f"dp_replicate > 1 (given: zero_stage={stage}, dp_replicate={replicas})."
            )
        if stage == 0 and replicas > 1:
            raise ValueError("zero_stage=0 keeps the whole model on every rank already: leave dp_replicate at 1.")
        if not self.overlap_grad_reduce and (stage > 1 or replicas > 1):
            raise ValueError(
                "overlap_grad_reduce=False is offered at zero_stage 0 and 1 without dp_replicate: sharded gradients "
                "are reduced while backward runs."
            )
        if not self.overlap_param_gather and stage in (0, 3):
            raise ValueError("overlap_param_gather=False is offered at zero_stage 1 and 2.")
        if stage < 3 and (self.double_buffer or self.nccl_ub):
            raise ValueError("double_buffer and nccl_ub are about gathered parameters: they need zero_stage=3.")

    # --- processes and dtypes -----------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Raises ValueError without the package or CUDA, before any process waits for another."""
        mfsdp.check_available(self.root_device)
        if self.nccl_ub:
            mfsdp.check_nccl_ub()
        super().setup_environment()

    def build_mesh(self) -> DeviceMesh:
        """The project's mesh; beside it the package's, of the same ranks in the same order."""
        dims = self.dims
        sizes = {mfsdp.OUTER: dims.dp_replicate, mfsdp.SHARD: dims.dp_shard * dims.cp, mfsdp.TP: dims.tp}
        axes = {name: size for name, size in sizes.items() if size > 1 or name != mfsdp.OUTER}
        self._buffer_mesh = init_device_mesh(self.root_device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        return super().build_mesh()

    @property
    def buffer_mesh(self) -> DeviceMesh:
        """`([dp_outer,] dp_shard_cp, tp)`: what the package's buffers are cut over."""
        assert self._buffer_mesh is not None, "the mesh exists once the processes have started"
        return self._buffer_mesh

    def convert_precision(self, plugin: Precision) -> Precision:
        if str(plugin.precision) == "64-true":
            raise ValueError("precision='64-true' is not offered by megatron_fsdp. Allowed: fp32, bf16, bf16-true.")
        return super().convert_precision(plugin)

    @property
    def options(self) -> mfsdp.Options:
        """What the package is asked for under the Trainer's precision."""
        dtypes = self.dtypes
        main = _DTYPES.get(self.main_params_dtype, dtypes.parameters)
        main_dtype = None if main == dtypes.compute else main  # else the optimizer updates the parameters themselves
        reduce = _DTYPES.get(self.grad_reduce_dtype, torch.float32)
        grads = dtypes.compute if main_dtype is None else torch.promote_types(main, torch.float32)
        return mfsdp.Options(
            zero_stage=self.zero_stage,
            outer_zero_stage=self.outer_zero_stage,
            overlap_grad_reduce=self.overlap_grad_reduce,
            overlap_param_gather=self.overlap_param_gather,
            double_buffer=self.double_buffer,
            nccl_ub=self.nccl_ub,
            compute_dtype=dtypes.compute,
            main_dtype=main_dtype,
            grads_dtype=grads,
            reduce_dtype=None if reduce == grads else reduce,
        )

    def forget_run(self) -> None:
        super().forget_run()
        self._buffer_mesh = None

    # --- laying out -------------------------------------------------------------------------------------------------

    @property
    def _needs_shards(self) -> bool:
        return True

    def _shard(self, model: nn.Module, sum_gradients: bool) -> None:
        """Even shards first, which weights can be streamed into; `place` hands them to the package."""
        if quantized_weights(model):
            raise ValueError("megatron_fsdp cannot shard 4-bit weights. Use strategy='fsdp2', or no quantize.")
        stage(model, self.buffer_mesh[mfsdp.SHARD, mfsdp.TP])

    def finalize_parameters(self, model: nn.Module) -> None:
        if mfsdp.wrapper_of(model) is not None:
            return
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        if frozen and not self.overlap_grad_reduce:
            raise ValueError("overlap_grad_reduce=False cannot train a partly frozen model (LoRA). Set it to true.")
        units = list(dict.fromkeys(type(block) for block in find_blocks(model)))
        if not units:
            raise ValueError(
                f"{type(model).__name__} has no list of blocks (nn.ModuleList) to make units of. Use strategy='fsdp2'."
            )
        mfsdp.shard_model(model, self.buffer_mesh, units, self.options, self.root_device)

    def layout(self, module: pl.LightningModule) -> None:
        if not isinstance(module, Objective):
            raise ValueError(
                f"megatron_fsdp runs CausalLMModule, or any module with `model`, `split` and `loss`; "
                f"{type(module).__name__} calls its model itself. Use strategy='fsdp2'."
            )
        super().layout(module)
        self.finalize_parameters(module.model)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            mfsdp.shard_optimizer(optimizer)

    def reshard(self) -> None:
        assert self.lightning_module is not None
        model = getattr(self.lightning_module, "model", None)
        wrapper = mfsdp.wrapper_of(model) if isinstance(model, nn.Module) else None
        if wrapper is not None:
            mfsdp.use_distributed(wrapper)

    # --- one step ---------------------------------------------------------------------------------------------------

    def forward_backward(
        self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: torch.Tensor
    ) -> torch.Tensor:
        # The optimizer's `zero_grad` would clear the buffers too, but not through Lightning's wrapper of optimizers.
        mfsdp.wrapper_of(objective.model).zero_grad_buffer()  # type: ignore[union-attr]
        return super().forward_backward(objective, micro_batches, num_tokens)

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        outputs = super().forward(model, inputs)
        if self._in_step:
            mfsdp.begin_backward(mfsdp.wrapper_of(model))
        return outputs

    @contextmanager
    def gradient_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        wrapper = mfsdp.wrapper_of(model)
        assert wrapper is not None
        wrapper.is_last_microbatch = last and self.overlap_grad_reduce  # else `finish_gradients` reduces them
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        mfsdp.end_backward(wrapper, model)
        if last:
            mfsdp.finish_gradients(wrapper)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        self.reshard()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        self.reshard()
        loaded = super().load_checkpoint(checkpoint_path, weights_only)
        mfsdp.refresh(mfsdp.wrapper_of(self.trained_module))
        return loaded
