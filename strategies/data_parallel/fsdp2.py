"""FSDP2 and HSDP: parameters, gradients and optimizer state sharded per parameter as DTensors (`fully_shard`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, final

import lightning.pytorch as pl
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from automodel_trainer.distributed.mesh import SHARD_AXES, ParallelDims, submesh
from automodel_trainer.nn._torch import apply_to_tensors
from automodel_trainer.strategies.base.budget import Memory
from automodel_trainer.strategies.base.compile import compile_any_length
from automodel_trainer.strategies.base.objective import Objective
from automodel_trainer.strategies.base.precision import MeshPrecision, check_plugin
from automodel_trainer.strategies.base.user_module import outermost, parts_of
from automodel_trainer.strategies.context.attention import CPAttention
from automodel_trainer.strategies.data_parallel import gradient_reduction
from automodel_trainer.strategies.data_parallel.fp8_gather import gather_in_fp8
from automodel_trainer.strategies.data_parallel.reshard import reshard
from automodel_trainer.strategies.data_parallel.shard import (
    ShardedExperts,
    ShardOptions,
    Shards,
    batch_norm_parameters,
    is_laid_out,
)
from automodel_trainer.strategies.expert.choose import check_dispatch_unused, chosen_dispatcher
from automodel_trainer.strategies.expert.mesh import expert_mesh, expert_shard_mesh
from automodel_trainer.strategies.expert.parallelize import expert_parallel
from automodel_trainer.strategies.expert.plan import check_ep, choose_ep, find_experts, require_experts
from automodel_trainer.strategies.inner_parallel import ActivationCheckpointing, InnerParallelStrategy, TiledMLP


class FSDP2Strategy(InnerParallelStrategy):
    """Fully sharded data parallel training; with `dp_replicate` > 1 hybrid sharded (HSDP).

    Every block of the model is one unit: its parameters are gathered before its forward and backward and freed after.
    On one device there is nothing to shard. `fully_shard` is then applied only for mixed precision and CPU offload.
    If only adapters are trained there, they cast their parameters themselves. A user's own LightningModule is autocast.

    Args:
        dp_shard: ranks to shard over; -1 takes all remaining ranks.
        dp_replicate: replicas of the sharded model (HSDP: replicate between nodes, shard within).
        cp: ranks that every sequence is split over; they also shard parameters. "auto": all ranks of a node.
        cp_attention: "ulysses" (all-to-all; any mask and kernel, but cp must divide the heads), "ring" (keys and values
            are passed around; any cp), or "auto": ulysses if it fits, else ring.
        tp: ranks that a layer's matrices are split over, by the plan that the model declares. "auto": as many as the
            node and the model's heads allow.
        tp_plan: rules that override the model's own (`model.tp_plan`: same names, same styles).
        sequence_parallel: with tp > 1, norms, dropout and residuals work on parts of the sequence too.
        async_tp: overlap tensor-parallel collectives with matmuls (needs GPUs, compile and sequence_parallel).
        ep: ranks that the experts of a layer are split over (expert parallel), by the plan that the model declares. It
            borrows ranks from dp_shard × cp × tp and must divide their product and the number of experts. "auto": as
            many as a node and the experts allow.
        reshard_after_forward: free a block's gathered parameters between its forward and backward (ZeRO-3). False
            keeps them (ZeRO-2: more memory, fewer gathers).
        forward_prefetch: number of blocks to gather ahead of the one that runs, beyond FSDP2's own overlap.
        backward_prefetch: the same for backward.
        cpu_offload: keep parameters, gradients and optimizer state in CPU memory, and copy blocks to the GPU for use.
        activation_checkpointing: "full" recomputes every block in backward; "selective" keeps the outputs of matmuls
            and attention and recomputes the rest; "offload" is "full" whose saved inputs lie in host memory, as far as
            it is free, and results of attention where they leave room. They are copied while other blocks compute.
            Inputs that do not fit are recomputed too on one device, and else stay there. "full:20" does it for the
            first 20 blocks, "full:20+selective" with another mode for the rest.
        tiled_mlp: compute the MLP of every block in this many tiles of tokens, so that its activations exist for one
            tile at a time. "auto": tiles of 8,192 tokens where a micro-batch has more than two of them, with
            activation_checkpointing "full" or "offload".
        memory: choose both so that a step fits: "80%" of the device, "20GiB", or a number of GiB that tensors may take.
            Steps of the largest micro-batch are tried before the first one (`budget.py`).
        sync_every_micro_batch: reduce gradients after every micro-batch instead of once per optimizer step. This costs
            more traffic, but no gathered gradients (4 bytes for each trained parameter) are held while micro-batches
            accumulate. "auto": where these would take more than a tenth of a GPU's memory.
        compile, compile_backend, compile_options, launcher, process_group_backend, timeout: see `MeshStrategy`.

    Source: `torch.distributed.fsdp.fully_shard`; ZeRO, arXiv 1910.02054.
    """

    def __init__(
        self,
        dp_shard: int = -1,
        dp_replicate: int = 1,
        *,
        cp: int | Literal["auto"] = 1,
        cp_attention: CPAttention = "auto",
        tp: int | Literal["auto"] = 1,
        tp_plan: Mapping[str, str] | None = None,
        sequence_parallel: bool = True,
        async_tp: bool = False,
        ep: int | Literal["auto"] = 1,
        reshard_after_forward: bool = True,
        forward_prefetch: int = 0,
        backward_prefetch: int = 0,
        cpu_offload: bool = False,
        activation_checkpointing: ActivationCheckpointing = None,
        tiled_mlp: TiledMLP = False,
        memory: Memory = None,
        sync_every_micro_batch: bool | Literal["auto"] = "auto",
        **kwargs: Any,
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
            memory=memory,
            **kwargs,
        )
        self.ep = ep
        self._expert_mesh: DeviceMesh | None = None
        self.reshard_after_forward = reshard_after_forward
        self.forward_prefetch, self.backward_prefetch = forward_prefetch, backward_prefetch
        self.cpu_offload = cpu_offload
        self.sync_every_micro_batch = sync_every_micro_batch
        self.shards = Shards(
            ShardOptions(
                reshard_after_forward, forward_prefetch, backward_prefetch, cpu_offload, sync_every_micro_batch
            )
        )

    # --- laying out ---------------------------------------------------------------------------------------------------

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Lay `model` out on the mesh, in place. Read top to bottom, this is the order of everything applied.

        Raises:
            ValueError: this layout does not fit the model.
        """
        if is_laid_out(model):
            return model
        self.broadcast_from_rank_zero(model)
        self.size_experts(model)
        self.allow_async_tp()
        self.checkpoint_activations(model, before_tp=True)
        self.compile_model(model)
        self.split_sequences(model)
        self.split_experts(model)
        self.cut_matrices(model)
        self.checkpoint_activations(model, before_tp=False)
        self.shard(model)
        return model

    @final
    def size_experts(self, model: nn.Module) -> None:
        """Expert parallel: choose `ep="auto"`, check it, and build the experts' mesh. Collective.

        Call it on the whole model: a pipeline stage may hold no experts.

        Raises:
            ValueError: the model declares no experts to split, or `ep` does not divide them or the ranks.
        """
        if self.ep == 1:
            check_dispatch_unused(model)
            return
        experts = math.gcd(*(layer.count for layer in require_experts(model)))
        ranks = self.dims.dp_shard * self.dims.cp * self.dims.tp
        if self.ep == "auto":
            node = math.gcd(ranks, self.num_processes)
            self.ep = choose_ep(experts, node)
            rank_zero_info(
                f"ep='auto': chose ep={self.ep} for {node} device(s) per node and {experts} experts. Set ep=… to "
                "override."
            )
        check_ep(self.ep, experts, ranks)
        self._expert_mesh = expert_mesh(self.dims, self.ep, self.root_device.type) if self.ep > 1 else None

    @final
    def split_experts(self, model: nn.Module) -> None:
        """Expert parallel: split the experts of `model` over ranks. FSDP2 shards what a rank holds once more."""
        if self._expert_mesh is None:
            return
        layers = find_experts(model)
        split = [] if self.shards.experts is None else self.shards.experts.modules  # of a module's other models
        tp = self.device_mesh["tp"].get_group() if self.dims.tp > 1 else None
        compute = compile_any_length(self.compile_backend, self.compile_options) if self.compiles else None
        mesh = self._expert_mesh["ep"]
        dispatcher = chosen_dispatcher(model, mesh.get_group(), self.root_device)
        expert_parallel(layers, mesh, tp, dispatcher, compute)
        self.shards.experts = ShardedExperts(
            [*split, *(experts.module for experts in layers)], expert_shard_mesh(self._expert_mesh)
        )

    @final
    def shard(self, model: nn.Module) -> None:
        """Shard `model` over the mesh. If nothing needs FSDP2, only move a real model to this rank's device.

        Raises:
            ValueError: CPU offload of quantized weights on one rank, or fp8_all_gather=true where it cannot work.
        """
        if not self.needs_shards:
            if not any(parameter.is_meta for parameter in model.parameters()):
                model.to(self.root_device)
            return
        alone = self.world_size == 1 and not self._of_a_user  # a user's optimizer may hold shards beside the adapters
        whole = batch_norm_parameters(model) if self._of_a_user and self.dtypes.mixed else set()
        self.shards.apply(model, self.shard_mesh, self.dtypes, alone=alone, whole=whole)
        gather_in_fp8(
            model,
            self.shard_mesh,
            tp=self.dims.tp,
            cpu_offload=self.cpu_offload,
            compile_backend=self.compile_backend if self.compiles else None,
        )

    @property
    def expert_ranks(self) -> int | Literal["auto"]:
        """See `MeshStrategy.expert_ranks`. "auto" is resolved when a model is laid out."""
        return self.ep

    @property
    @final
    def needs_shards(self) -> bool:
        """Whether FSDP2 has anything to do: shard, cast, or offload. A user's own module on one device is autocast."""
        casts = self.dtypes.mixed and not (self._of_a_user and self.world_size == 1)
        return self.dp_size * self.dims.cp > 1 or casts or self.cpu_offload or self.shards.experts is not None

    @property
    def _of_a_user(self) -> bool:
        """Whether the model belongs to a user's own LightningModule."""
        return self.lightning_module is not None and not isinstance(self.lightning_module, Objective)

    @property
    @final
    def shard_mesh(self) -> DeviceMesh:
        """The 1-D mesh that parameters are sharded over; for HSDP the 2-D mesh (replicate, shard)."""
        shard = submesh(self.device_mesh, SHARD_AXES)
        assert shard is not None
        if self.dims.dp_replicate == 1:
            return shard
        assert shard.mesh_dim_names is not None
        return self.device_mesh[("dp_replicate", *shard.mesh_dim_names)]

    def forget_interrupted(self, model: nn.Module) -> None:
        """See `MeshStrategy.forget_interrupted`."""
        self.shards.forget_interrupted(model)

    def finalize_parameters(self, model: nn.Module) -> None:
        """See `Shards.finish`."""
        self.shards.finish(model, self.root_device)

    def convert_precision(self, plugin: Precision) -> Precision:
        """Replace Lightning's plugin: FSDP2 casts parameters, so only a user's own module is autocast.

        Raises:
            ValueError: the precision is not supported, or the plugin is the user's own.
        """
        check_plugin(plugin)
        return MeshPrecision(str(plugin.precision))

    def forget_run(self) -> None:
        """See `MeshStrategy.forget_run`."""
        super().forget_run()
        self._expert_mesh = None
        self.shards.forget()

    # --- a user's own LightningModule ---------------------------------------------------------------------------------

    def lay_out_user_module(self, module: pl.LightningModule) -> None:
        """Lay out the module's parts one by one, in the order of `parallelize`.

        Such a module takes the mean of its loss on each rank, so gradients are averaged over ranks (FSDP2's default).

        Raises:
            ValueError: cp > 1, or tp > 1 or ep > 1 and the module holds no Hugging Face model that fits it.
        """
        if self.dims.cp > 1:
            raise ValueError(
                f"cp={self.dims.cp} can split the sequences of a CausalLMModule (or any module with `model`, `split` "
                f"and `loss`); {type(module).__name__} calls its model itself. Set cp=1."
            )
        parts = list(parts_of(module))
        taken = [part for part in parts if is_laid_out(part)]  # `configure_model` did it
        fresh = [part for part in parts if not is_laid_out(part)]
        for part in fresh:
            self.broadcast_from_rank_zero(part)
        self.allow_async_tp()
        self.checkpoint_activations(module, before_tp=True)
        self.compile_model(module)
        for model in self._models_to_cut(module, taken, fresh):
            self.size_experts(model)
            self.split_experts(model)
            if self.dims.tp > 1:
                self.cut_matrices(model)
        self.checkpoint_activations(module, before_tp=False)
        for part in fresh if self.needs_shards else ():
            self.shard(part)
        gradient_reduction.average_unsharded_gradients(module, self.world_size)
        # Whatever is not sharded (buffers, parameters of the module itself) still has to move to the device.
        apply_to_tensors(module, lambda t: t if isinstance(t, DTensor) else t.to(self.root_device))

    def _models_to_cut(
        self, module: pl.LightningModule, taken: list[nn.Module], fresh: list[nn.Module]
    ) -> list[PreTrainedModel]:
        """The Hugging Face models in the new parts, which tensor and expert parallel split."""
        if self.dims.tp == 1 and self.ep == 1:
            return []
        models = [model for part in fresh for model in outermost(part, PreTrainedModel)]
        if not models and not taken:
            sizes = f"tp={self.dims.tp}" if self.dims.tp > 1 else f"ep={self.ep}"
            raise ValueError(
                f"{sizes} splits Hugging Face models by the plan they declare, and {type(module).__name__} holds none. "
                f"Set {sizes[:2]}=1 and shard with fsdp2 instead."
            )
        return models

    # --- running a step -----------------------------------------------------------------------------------------------

    @property
    def gradient_scale(self) -> float:
        """The number of ranks that FSDP2 averages over: those that compute different tokens."""
        return float(self.dp_size * self.dims.cp)

    def gradient_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """See `StepRunner.gradient_sync`."""
        return self.shards.sync(model, last)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """A context in which no gradients are reduced. Lightning enters it while automatic optimization accumulates."""
        assert self.lightning_module is not None
        with self.shards.no_sync(self.lightning_module):
            yield

    def setup(self, trainer: pl.Trainer) -> None:
        """See `MeshStrategy.setup`. Gathered parameters are freed first: the optimizer must get the shards."""
        self.reshard()
        super().setup(trainer)

    @final
    def reshard(self) -> None:
        """Free gathered parameters. After an evaluation the root unit still holds its own."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `reshard`. Callbacks that change or read weights when an epoch of validation ends find the shards."""
        output = super().validation_step(*args, **kwargs)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        alone = trainer.state.fn == TrainerFn.VALIDATING
        loop = trainer.validate_loop if alone else trainer.fit_loop.epoch_loop.val_loop
        if loop.batch_progress.is_last_batch:  # not before: each batch would gather the root unit again
            self.reshard()
        return output

    def on_validation_end(self) -> None:
        """See `reshard`."""
        self.reshard()

    def on_test_end(self) -> None:
        """See `reshard`."""
        self.reshard()

    def on_predict_end(self) -> None:
        """See `reshard`."""
        self.reshard()
