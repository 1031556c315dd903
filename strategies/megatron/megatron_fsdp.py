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

from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.models.quantization.quantize import quantized_weights
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.strategies.base.mesh_strategy import MicroBatch, Objective
from automodel_trainer.strategies.base.precision import MeshPrecision, check_plugin
from automodel_trainer.strategies.context.attention import CPAttention
from automodel_trainer.strategies.data_parallel.shard import is_laid_out
from automodel_trainer.strategies.inner_parallel import ActivationCheckpointing, InnerParallelStrategy, TiledMLP
from automodel_trainer.strategies.megatron import _megatron_fsdp as mfsdp
from automodel_trainer.strategies.megatron.even_shards import shard_evenly

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Dtype = Literal["auto", "fp32", "bf16"]


class MegatronFSDPStrategy(InnerParallelStrategy):
    """Shard with Megatron-FSDP; mesh, tensor, sequence and context parallel as in `FSDP2Strategy`. NVIDIA GPUs only.

    Every block of the model is one unit. Parameters are also sharded over the ranks of context parallel.

    When to use which: `fsdp2` is part of torch, runs on any device, offloads to the CPU, and trains 4-bit weights and
    any LightningModule. `megatron_fsdp` has ZeRO-1 and ZeRO-2 (parameters are not gathered before every block, but take
    memory), can shard optimizer state over replicas too (`dp_replicate` > 1), keeps parameters in flat buffers that
    need no copy around a collective, and can register these buffers with NCCL. Both write the same checkpoints, so a
    run can switch from one to the other.

    Args:
        zero_stage: what is sharded. 0: nothing; 1: optimizer state and main weights; 2: gradients too; 3: parameters
            too.
        dp_shard, dp_replicate, cp, cp_attention, tp, tp_plan, sequence_parallel, async_tp: see `FSDP2Strategy`.
        activation_checkpointing, tiled_mlp: the same.
        outer_zero_stage: with `dp_replicate` > 1, 1 shards optimizer state over the replicas too, 0 does not. None: 1
            at `zero_stage=3` (the only stage that has it), else 0.
        overlap_grad_reduce: reduce gradients while backward runs. False is possible only at stages 0 and 1.
        overlap_param_gather: gather parameters ahead of their block. False is possible only at stages 1 and 2.
        double_buffer: gather into two buffers that are kept, instead of allocating.
        nccl_ub: register buffers with NCCL (needs megatron-core's or apex's allocator; implies `double_buffer`).
        grad_reduce_dtype: dtype that gradients are reduced in. "auto": fp32.
        main_params_dtype: dtype of the weights that the optimizer updates. "auto": follows the Trainer's precision.
        compile, compile_backend, compile_options, launcher, process_group_backend, timeout: see `MeshStrategy`.

    Source: Megatron-LM, megatron/core/distributed/fsdp; ZeRO, arXiv 1910.02054.

    Raises:
        ValueError: an option has an unknown value, or two options exclude each other.
    """

    plain_backward = False

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
        activation_checkpointing: ActivationCheckpointing = None,
        tiled_mlp: TiledMLP = False,
        compile: bool | Literal["auto"] = "auto",
        compile_backend: str = "inductor",
        compile_options: dict[str, Any] | None = None,
        launcher: Literal["auto", "subprocess", "fork", "spawn"] = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            ParallelDims(dp_replicate=dp_replicate, dp_shard=dp_shard),
            cp=cp,
            cp_attention=cp_attention,
            tp=tp,
            tp_plan=tp_plan,
            sequence_parallel=sequence_parallel,
            async_tp=async_tp,
            activation_checkpointing=activation_checkpointing,
            tiled_mlp=tiled_mlp,
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
                "outer_zero_stage=1 shards optimizer state over replicas of a sharded model. It needs zero_stage=3 and "
                f"dp_replicate > 1 (given: zero_stage={stage}, dp_replicate={replicas})."
            )
        if stage == 0 and replicas > 1:
            raise ValueError(
                f"zero_stage=0 keeps the whole model on every rank: leave dp_replicate at 1 (given: {replicas})."
            )
        if not self.overlap_grad_reduce and (stage > 1 or replicas > 1):
            raise ValueError(
                "overlap_grad_reduce=False works only at zero_stage 0 and 1 without dp_replicate, because sharded "
                f"gradients are reduced while backward runs (given: zero_stage={stage}, dp_replicate={replicas})."
            )
        if not self.overlap_param_gather and stage in (0, 3):
            raise ValueError(
                f"overlap_param_gather=False works only at zero_stage 1 and 2 (given: zero_stage={stage})."
            )
        if stage < 3 and (self.double_buffer or self.nccl_ub):
            raise ValueError(
                f"double_buffer and nccl_ub apply to gathered parameters: they need zero_stage=3 (given: {stage})."
            )

    # --- processes and dtypes -----------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Check that Megatron-FSDP can run, then start the process group and build the mesh.

        Raises:
            ValueError: the package or CUDA is missing, or the sizes do not fit the number of ranks. It is raised before
                any process waits for another.
        """
        mfsdp.check_available(self.root_device)
        if self.nccl_ub:
            mfsdp.check_nccl_ub()
        super().setup_environment()

    def build_mesh(self) -> DeviceMesh:
        """Build the project's mesh, and for the package a second one with the same ranks in the same order."""
        dims = self.dims
        sizes = {mfsdp.OUTER: dims.dp_replicate, mfsdp.SHARD: dims.dp_shard * dims.cp, mfsdp.TP: dims.tp}
        axes = {name: size for name, size in sizes.items() if size > 1 or name != mfsdp.OUTER}
        self._buffer_mesh = init_device_mesh(self.root_device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        return super().build_mesh()

    @property
    def buffer_mesh(self) -> DeviceMesh:
        """The mesh that the package shards its buffers over: `([dp_outer,] dp_shard_cp, tp)`."""
        assert self._buffer_mesh is not None, "the mesh exists once the processes have started"
        return self._buffer_mesh

    def convert_precision(self, plugin: Precision) -> Precision:
        """Replace Lightning's plugin: the package casts parameters, so nothing is autocast.

        Raises:
            ValueError: the precision is not supported, or the plugin is the user's own.
        """
        if str(plugin.precision) == "64-true":
            raise ValueError("precision='64-true' is not supported by megatron_fsdp. Allowed: fp32, bf16, bf16-true.")
        check_plugin(plugin)
        return MeshPrecision(str(plugin.precision))

    @property
    def options(self) -> mfsdp.Options:
        """The package's options under the Trainer's precision."""
        dtypes = self.dtypes
        main = _DTYPES.get(self.main_params_dtype, dtypes.parameters)
        main_dtype = None if main == dtypes.compute else main  # None: the optimizer updates the parameters themselves
        reduce = _DTYPES.get(self.grad_reduce_dtype, torch.float32)
        # With main weights, gradients are accumulated in fp32 or wider.
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
        """See `MeshStrategy.forget_run`."""
        super().forget_run()
        self._buffer_mesh = None

    # --- laying out -------------------------------------------------------------------------------------------------

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Lay `model` out in even shards, in place. `finalize_parameters` moves them into the package's buffers.

        Raises:
            ValueError: this layout does not fit the model.
        """
        if is_laid_out(model):
            return model
        self.broadcast_from_rank_zero(model)
        self.allow_async_tp()
        self.checkpoint_activations(model, before_tp=True)
        self.compile_model(model)
        self.split_sequences(model)
        self.cut_matrices(model)
        self.checkpoint_activations(model, before_tp=False)
        self._shard_evenly(model)
        return model

    @property
    def blocks_run_alone(self) -> bool:
        """Never: the package lets a block have its weights only when its turn has come."""
        return False

    def _shard_evenly(self, model: nn.Module) -> None:
        """Cut parameters into even shards, which weights can be streamed into."""
        if quantized_weights(model):
            raise ValueError("megatron_fsdp cannot shard 4-bit weights. Use strategy='fsdp2', or set quantize to null.")
        shard_evenly(model, self.buffer_mesh[mfsdp.SHARD, mfsdp.TP])

    def finalize_parameters(self, model: nn.Module) -> None:
        """Move the values of the even shards into the package's buffers. A second call is a no-op.

        Raises:
            ValueError: the model has no blocks, is partly frozen with `overlap_grad_reduce=False`, or has a parameter
                that the package cannot shard.
        """
        if mfsdp.wrapper_of(model) is not None:
            return
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        if frozen and not self.overlap_grad_reduce:
            raise ValueError(
                "overlap_grad_reduce=False cannot train a partly frozen model (LoRA). Set overlap_grad_reduce=True."
            )
        units = list(dict.fromkeys(type(block) for block in find_blocks(model)))
        if not units:
            raise ValueError(
                f"megatron_fsdp shards a model block by block, and {type(model).__name__} has no list of blocks "
                "(nn.ModuleList). Use strategy='fsdp2'."
            )
        mfsdp.shard_model(model, self.buffer_mesh, units, self.options, self.root_device)
        model.register_forward_pre_hook(self._refuse_a_plain_loop)

    def _refuse_a_plain_loop(self, model: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled() and model.training and not self._in_step:
            raise ValueError(
                "megatron_fsdp needs hooks between forward and backward, so a model of it cannot be trained by calling "
                "loss.backward(). Use strategy.forward_backward, the Trainer, or strategy='fsdp2'."
            )

    def layout(self, module: pl.LightningModule) -> None:
        """See `MeshStrategy.layout`. A model that was built with its values is finalized here."""
        super().layout(module)
        self.finalize_parameters(module.model)  # type: ignore[arg-type]

    def lay_out_user_module(self, module: pl.LightningModule) -> None:
        """Always refuse: the package needs hooks between forward and backward, so the strategy must run the step.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"megatron_fsdp runs CausalLMModule, or any module with `model`, `split` and `loss`; "
            f"{type(module).__name__} calls its model itself. Use strategy='fsdp2'."
        )

    def setup(self, trainer: pl.Trainer) -> None:
        """See `MeshStrategy.setup`. The modules get their shards back first: the optimizer must hold those."""
        self.reshard()
        super().setup(trainer)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Create the optimizers and connect them to the package's buffers."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            mfsdp.shard_optimizer(optimizer)

    def reshard(self) -> None:
        """Put the sharded parameters back into their modules. An evaluation leaves the gathered ones there."""
        assert self.lightning_module is not None
        model = getattr(self.lightning_module, "model", None)
        wrapper = mfsdp.wrapper_of(model) if isinstance(model, nn.Module) else None
        if wrapper is not None:
            mfsdp.use_distributed(wrapper)

    def on_validation_end(self) -> None:
        """See `reshard`."""
        self.reshard()

    def on_test_end(self) -> None:
        """See `reshard`."""
        self.reshard()

    def on_predict_end(self) -> None:
        """See `reshard`."""
        self.reshard()

    # --- one step ---------------------------------------------------------------------------------------------------

    def forward_backward(
        self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: torch.Tensor
    ) -> torch.Tensor:
        """See `StepRunner.forward_backward`."""
        # The optimizer's `zero_grad` clears the package's buffers too, but not through Lightning's optimizer wrapper.
        mfsdp.wrapper_of(objective.model).zero_grad_buffer()  # type: ignore[union-attr]
        return super().forward_backward(objective, micro_batches, num_tokens)

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """See `StepRunner.forward`."""
        outputs = super().forward(model, inputs)
        if self._in_step:  # a backward follows
            mfsdp.begin_backward(mfsdp.wrapper_of(model))
        return outputs

    @contextmanager
    def gradient_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        """See `StepRunner.gradient_sync`."""
        wrapper = mfsdp.wrapper_of(model)
        assert wrapper is not None
        wrapper.is_last_microbatch = last and self.overlap_grad_reduce  # without overlap `finish_gradients` reduces
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
        """See `SavingStrategy.save_checkpoint`. It reads the sharded parameters, not the gathered ones."""
        self.reshard()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """See `SavingStrategy.load_model_state_dict`. The model is then told that its weights have changed."""
        self.reshard()
        super().load_model_state_dict(checkpoint, strict)
        mfsdp.refresh(mfsdp.wrapper_of(self.trained_module))
