"""FSDP2 and HSDP: parameters, gradients and optimizer state sharded per parameter as DTensors (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import Precision
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from automodel_trainer.distributed._dtensor import StridedShard
from automodel_trainer.distributed.mesh import SHARD_AXES, ParallelDims, submesh
from automodel_trainer.models.lora.layers import Adapter, adapters, let_adapters_cast
from automodel_trainer.models.quantization.quantize import quantized_weights
from automodel_trainer.nn.blocks import find_blocks, untied_input_embedding
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy, MicroBatch, Objective, Part
from automodel_trainer.strategies.base.precision import MeshPrecision, check_plugin, fsdp_policy
from automodel_trainer.strategies.base.user_module import outermost, parts_of
from automodel_trainer.strategies.context.attention import CPAttention, check_method, install_attention
from automodel_trainer.strategies.context.split import ContextParallel
from automodel_trainer.strategies.data_parallel import gradient_reduction
from automodel_trainer.strategies.data_parallel._fsdp import lay_out_gradients_at_once
from automodel_trainer.strategies.data_parallel.accumulate_grads_foreach import accumulate_grads_foreach
from automodel_trainer.strategies.data_parallel.fp8_gather import gather_in_fp8
from automodel_trainer.strategies.tensor.async_tp import enable_async_tp
from automodel_trainer.strategies.tensor.check import check_replicas
from automodel_trainer.strategies.tensor.loss_parallel import sharded_logits
from automodel_trainer.strategies.tensor.parallelize import tensor_parallel
from automodel_trainer.strategies.tensor.size import choose_tp

_SMALL = 2**30  # bytes


class FSDP2Strategy(MeshStrategy):
    """Fully sharded data parallel training; with `dp_replicate` > 1 hybrid sharded (HSDP).

    Every block of the model is one unit: its parameters are gathered before its forward and backward and freed after.
    On one device nothing needs sharding, and `fully_shard` is applied only for what else it does: mixed precision and
    CPU offload. Where adapters are all that is trained there, they cast themselves.

    Args:
        dp_shard: ranks to shard over; -1 takes all that are left.
        dp_replicate: replicas of the sharded model (HSDP: replicate between nodes, shard within).
        cp: ranks that every sequence is split over; they shard parameters like `dp_shard` does. "auto": all of a node.
        cp_attention: "ulysses" (all-to-all, any mask and kernel; cp must divide the heads), "ring" (keys and values
            travel; any cp), or "auto": ulysses where it can.
        tp: ranks that a layer's matrices are split over, by the plan that the model declares. "auto": as many as the
            node and the model's heads allow.
        tp_plan: rules that override the model's own (`model.tp_plan`: same names, same styles).
        sequence_parallel: with tp > 1, norms, dropout and residuals work on parts of the sequence too.
        async_tp: overlap the collectives of tensor parallel with its matmuls (GPUs, compile, sequence_parallel).
        reshard_after_forward: free a block's gathered parameters between its forward and backward (ZeRO-3). False
            keeps them (ZeRO-2: more memory, fewer gathers).
        forward_prefetch: blocks whose parameters are gathered ahead of the one that runs, beyond FSDP2's own overlap.
        backward_prefetch: the same for backward.
        cpu_offload: keep parameters, gradients and optimizer state in CPU memory; blocks travel as they are needed.
        activation_checkpointing: "full" recomputes every block in backward; "selective" keeps the outputs of matmuls
            and attention and recomputes the rest.
        sync_every_micro_batch: reduce gradients after every micro-batch instead of once per optimizer step: more
            traffic, but unsharded gradients are not held while micro-batches accumulate.
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
        reshard_after_forward: bool = True,
        forward_prefetch: int = 0,
        backward_prefetch: int = 0,
        cpu_offload: bool = False,
        activation_checkpointing: Literal["full", "selective"] | None = None,
        sync_every_micro_batch: bool = False,
        **kwargs: Any,
    ) -> None:
        check_method(cp_attention)
        dims = ParallelDims(dp_replicate=dp_replicate, dp_shard=dp_shard, cp=1 if cp == "auto" else cp)
        dims = replace(dims, tp=1 if tp == "auto" else tp)
        super().__init__(dims, **kwargs)
        self._cp_of_node = cp == "auto"
        self.cp_attention = cp_attention
        self._context: ContextParallel | None = None
        self._tp_of_model = tp == "auto"
        self.tp_plan = tp_plan
        self.sequence_parallel = sequence_parallel
        self.async_tp = async_tp
        self._check_replicas = False
        self._keeps_copies = False
        self._self_casting: list[Adapter] = []
        self.reshard_after_forward = reshard_after_forward
        self.forward_prefetch = forward_prefetch
        self.backward_prefetch = backward_prefetch
        self.cpu_offload = cpu_offload
        self.activation_checkpointing = activation_checkpointing
        self.sync_every_micro_batch = sync_every_micro_batch

    def choose_sizes(self) -> ParallelDims:
        if self._tp_of_model:
            room = self.num_processes // self.requested_dims.cp
            self.requested_dims = replace(self.requested_dims, tp=choose_tp(self.lightning_module, room))
        if self._cp_of_node:
            self.requested_dims = replace(self.requested_dims, cp=self.num_processes // self.requested_dims.tp)
        self._tp_of_model = self._cp_of_node = False
        return self.requested_dims

    def ineffective_options(self) -> list[str]:
        idle = []
        if self.requested_dims.tp == 1 and self.tp_plan:
            idle.append("tp_plan with tp=1 (nothing is cut)")
        if self.requested_dims.cp == 1 and self.cp_attention != "auto":
            idle.append(f"cp_attention={self.cp_attention!r} with cp=1 (no sequence is split)")
        return idle

    def forget_run(self) -> None:
        super().forget_run()
        self._context = None
        self._self_casting = []

    def convert_precision(self, plugin: Precision) -> Precision:
        check_plugin(plugin)
        return MeshPrecision(str(plugin.precision))

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The 1-D mesh that parameters are sharded over, or for HSDP the 2-D mesh (replicate, shard)."""
        shard = submesh(self.device_mesh, SHARD_AXES)
        assert shard is not None
        if self.dims.dp_replicate == 1:
            return shard
        assert shard.mesh_dim_names is not None
        return self.device_mesh[("dp_replicate", *shard.mesh_dim_names)]

    def parallelize(self, model: nn.Module) -> nn.Module:
        if is_laid_out(model):
            return model
        self._enable_async_tp()
        if self._checkpoints_inside:
            self._checkpoint_activations(model)
        self.compile_model(model)
        if self.dims.cp > 1:
            method = install_attention(model, self.dims.cp, self.dims.tp, self.cp_attention)  # type: ignore[arg-type]
            self._context = ContextParallel(self.device_mesh["cp"], method, multiple_of=self.dims.tp)
        if not _on_meta(model):
            self._broadcast_from_rank_zero(model)
        if self.dims.tp > 1:
            self._cut(model)
        if not self._checkpoints_inside:
            self._checkpoint_activations(model)
        if not self._needs_shards:
            return model if _on_meta(model) else model.to(self.root_device)
        self._shard(model, sum_gradients=True)
        return model

    @property
    def _checkpoints_inside(self) -> bool:
        """Whether the compiler sees what is recomputed. Under tp it does not: recomputing takes the parameters' parts
        anew. But what to keep of a compiled block only the compiler can tell."""
        return self.dims.tp == 1 or (self.compiles and self.activation_checkpointing == "selective")

    def _checkpoint_activations(self, model: nn.Module) -> None:
        if not self.activation_checkpointing:
            return
        if self._checkpoints_inside and self.dims.tp > 1 and self.dims.cp > 1:
            raise ValueError(
                "activation_checkpointing='selective' needs blocks that tensor parallel cut to be compiled in one "
                "piece, and the exchange of cp takes them apart. Set activation_checkpointing='full', or compile=False."
            )
        self.prepared.checkpoint(model, self.activation_checkpointing)

    def _enable_async_tp(self) -> None:
        if self.async_tp:
            enable_async_tp(
                submesh(self.device_mesh, ("tp",)),
                self.root_device,
                compiled=self.compiles,
                sequence_parallel=self.sequence_parallel,
            )

    def _cut(self, model: nn.Module) -> None:
        tensor_parallel(model, self.device_mesh["tp"], self.tp_plan, self.sequence_parallel)
        self._check_replicas = True

    @property
    def _needs_shards(self) -> bool:
        return self.dp_size * self.dims.cp > 1 or self.dtypes.mixed or self.cpu_offload

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        with sharded_logits():  # an objective's loss takes logits that tp left sharded over the vocabulary
            return super().forward(model, inputs)

    def forward_backward(
        self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: torch.Tensor
    ) -> torch.Tensor:
        loss = super().forward_backward(objective, micro_batches, num_tokens)
        self._check_replicas_once(objective.model)
        return loss

    def _check_replicas_once(self, model: nn.Module) -> None:
        if self._check_replicas:  # once: a plan that is wrong is wrong in the first step
            self._check_replicas = False
            check_replicas(model, self.device_mesh["tp"])

    def split_sequence(self, inputs: dict[str, Any], targets: Any) -> AbstractContextManager[Part]:
        if self._context is None:
            return super().split_sequence(inputs, targets)
        return self._context.split(inputs, targets)

    def gather_sequence(self, tensor: torch.Tensor, length: int) -> torch.Tensor:
        return tensor if self._context is None else self._context.gather(tensor, length)

    def _shard(self, model: nn.Module, sum_gradients: bool) -> None:
        offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        options: dict[str, Any] = {
            "mesh": self.shard_mesh,
            "mp_policy": fsdp_policy(self.dtypes),
            "shard_placement_fn": _shard_dimension,
            "offload_policy": offload if self.cpu_offload else OffloadPolicy(),
        }
        if self.shard_mesh.size(self.shard_mesh.ndim - 1) == 1:
            options["ignored_params"] = self._left_alone(model) | self._let_cast(model)
            self._keeps_copies = _small(model, self.dtypes.compute, options["ignored_params"])
        lay_out_gradients_at_once()
        blocks = find_blocks(model)
        reshard = self.reshard_after_forward and not self._keeps_copies
        for unit in (*blocks, *untied_input_embedding(model)):
            fully_shard(unit, reshard_after_forward=reshard, **options)
        # The root holds what is left (final norm, head, tied embedding). It stays gathered between forward and
        # backward: backward begins where forward ended.
        fully_shard(model, reshard_after_forward=False, **options)
        _prefetch(blocks, self.forward_prefetch, self.backward_prefetch)
        backend = self.compile_backend if self.compiles else None
        mesh, tp = self.shard_mesh, self.dims.tp
        gather_in_fp8(model, mesh, tp=tp, cpu_offload=self.cpu_offload, compile_backend=backend)
        if sum_gradients and self.shard_mesh.size() > 1:
            gradient_reduction.sum_gradients(model)

    def _let_cast(self, model: nn.Module) -> set[nn.Parameter]:
        """Adapters, where one device trains nothing else: FSDP2 would copy hundreds of small parameters one by one, and
        as many gradients. They cast themselves."""
        own = self.lightning_module is not None and not isinstance(self.lightning_module, Objective)
        if self.world_size > 1 or self.cpu_offload or own:  # an optimizer of a user's own may have shards beside them
            return set()
        found = list(adapters(model))
        held = {parameter for adapter in found for parameter in adapter.parameters}
        if held != {parameter for parameter in model.parameters() if parameter.requires_grad}:
            return set()
        let_adapters_cast(model, self.dtypes.compute)
        self._self_casting += found
        return held

    def _left_alone(self, model: nn.Module) -> set[nn.Parameter]:
        """Where there is nothing to gather: what FSDP2 would copy for nothing before every use (frozen weights in the
        dtype they compute in), and packed weights, of which it takes only the first of the inner tensors."""
        packed = quantized_weights(model)
        if not self.cpu_offload:
            frozen = {p for p in model.parameters() if not p.requires_grad and p.dtype == self.dtypes.compute}
            return packed | frozen
        if packed:
            raise ValueError("cpu_offload=True with 4-bit weights needs shards: set dp_shard > 1, or no offload.")
        return set()

    def finalize_parameters(self, model: nn.Module) -> None:
        """With CPU offload shards wait on the CPU; buffers, which do not travel, stay where the computation is."""
        if self.cpu_offload and self.root_device.type != "cpu":
            model.cpu()
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(self.root_device)

    def setup(self, trainer: pl.Trainer) -> None:
        self.reshard()  # the optimizer must be given the shards
        super().setup(trainer)

    def reshard(self) -> None:
        """Free gathered parameters. Training does so in backward; after an evaluation the root still holds its own."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def on_validation_end(self) -> None:
        self.reshard()

    def on_test_end(self) -> None:
        self.reshard()

    def on_predict_end(self) -> None:
        self.reshard()

    def layout(self, module: pl.LightningModule) -> None:
        if isinstance(module, Objective):
            if not is_laid_out(module.model):
                self.parallelize(module.model)
            return
        if self.dims.cp > 1:
            raise ValueError(
                f"cp={self.dims.cp} splits the sequence of micro-batches, which it can do for a CausalLMModule (or any "
                f"module with `model`, `split` and `loss`); {type(module).__name__} calls its model itself. Set cp=1."
            )
        self._layout_own(module)
        gradient_reduction.average_unsharded_gradients(module, self.world_size)
        module._apply(lambda t: t if isinstance(t, DTensor) else t.to(self.root_device))

    def _layout_own(self, module: pl.LightningModule) -> None:
        """A user's own LightningModule means its loss per rank, so gradients are averaged (FSDP2's default)."""
        parts = list(parts_of(module))
        taken = [part for part in parts if is_laid_out(part)]  # by `configure_model`
        fresh = [part for part in parts if not is_laid_out(part)]
        for part in taken:
            gradient_reduction.average_gradients(part)
        for part in fresh:
            self._broadcast_from_rank_zero(part)
        self._enable_async_tp()
        if self._checkpoints_inside:
            self._checkpoint_activations(module)
        self.compile_model(module)
        if self.dims.tp > 1:
            self._cut_own(module, taken, fresh)
        if not self._checkpoints_inside:
            self._checkpoint_activations(module)
        if self._needs_shards:
            for part in fresh:
                self._shard(part, sum_gradients=False)

    def _cut_own(self, module: pl.LightningModule, taken: list[nn.Module], fresh: list[nn.Module]) -> None:
        models = [model for part in fresh for model in outermost(part, PreTrainedModel)]
        if not models and not taken:
            raise ValueError(
                f"tp={self.dims.tp} cuts Hugging Face models by the plan they declare, and {type(module).__name__} "
                "holds none. Set tp=1 and shard with fsdp2 instead."
            )
        for model in models:
            self._cut(model)

    @torch.no_grad()
    def _broadcast_from_rank_zero(self, model: nn.Module) -> None:
        """Every rank keeps its shard of *rank 0's* values: ranks that built different random weights would mix them."""
        if self.world_size == 1:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            value = tensor.detach().to(self.root_device)
            dist.broadcast(value, src=0)
            tensor.copy_(value)

    @contextmanager
    def gradient_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or self.sync_every_micro_batch)
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last or not self._keeps_copies)
        # as they are now: those of a model that was laid out on meta have been replaced since
        with accumulate_grads_foreach(
            [parameter for adapter in self._self_casting for parameter in adapter.parameters]
        ):
            yield

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Used by Lightning while a user's automatic optimization accumulates."""
        if self.sync_every_micro_batch:
            yield
            return
        assert self.lightning_module is not None
        roots = [m for m in self.lightning_module.modules() if isinstance(m, FSDPModule)]
        for root in roots:
            root.set_requires_gradient_sync(False)
        yield
        for root in roots:
            root.set_requires_gradient_sync(True)


def is_laid_out(model: nn.Module) -> bool:
    """Whether some layout has already taken this module in hand."""
    return isinstance(model, FSDPModule) or any(isinstance(p, DTensor) for p in model.parameters())


def _small(model: nn.Module, dtype: torch.dtype, ignored: set[nn.Parameter]) -> bool:
    """Whether the copies in the dtype that computes, which are all that FSDP2 makes on one device, can stay for a whole
    optimizer step: those of adapters that are trained together with a few other parameters."""
    return sum(p.numel() for p in model.parameters() if p not in ignored) * dtype.itemsize <= _SMALL


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _shard_dimension(parameter: nn.Parameter) -> Shard | None:
    """Dimension 0, unless tensor parallel cuts it in a packed way, which FSDP2 cannot cut once more."""
    packed = isinstance(parameter, DTensor) and any(
        isinstance(p, StridedShard) and p.dim == 0 for p in parameter.placements
    )
    return Shard(1) if packed and parameter.ndim > 1 else None


def _prefetch(blocks: list[nn.Module], forward: int, backward: int) -> None:
    for index, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        if forward:
            block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + forward])  # type: ignore[arg-type]
        if backward:
            before = blocks[max(0, index - backward) : index]
            block.set_modules_to_backward_prefetch(before[::-1])  # type: ignore[arg-type]
