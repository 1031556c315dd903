"""The base of strategies that split work inside a model's blocks: tensor, sequence and context parallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.distributed.mesh import ParallelDims, submesh
from automodel_trainer.models._transformers import has_tower
from automodel_trainer.nn.deferred_logits import deferred_logits
from automodel_trainer.nn.tiles import Count
from automodel_trainer.strategies.base.activation_checkpointing import Mode
from automodel_trainer.strategies.base.block_modes import check_modes, uses
from automodel_trainer.strategies.base.budget import Budget, Memory
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy
from automodel_trainer.strategies.base.objective import MicroBatch, Objective, Part
from automodel_trainer.strategies.context.at_decoder import split_at_decoder
from automodel_trainer.strategies.context.attention import (
    CPAttention,
    check_method,
    install_attention,
    refuse_unsplittable,
)
from automodel_trainer.strategies.context.rehearsal import check_shards
from automodel_trainer.strategies.context.split import ContextParallel
from automodel_trainer.strategies.tensor.async_tp import enable_async_tp
from automodel_trainer.strategies.tensor.check import check_replicas
from automodel_trainer.strategies.tensor.loss_parallel import sharded_logits
from automodel_trainer.strategies.tensor.parallelize import tensor_parallel
from automodel_trainer.strategies.tensor.rehearsal import check_reads, forgotten_rules
from automodel_trainer.strategies.tensor.size import choose_tp

ActivationCheckpointing = Mode | str | None
TiledMLP = Count | Literal[False]


class InnerParallelStrategy(MeshStrategy):
    """Tensor, sequence and context parallel, activation checkpointing and compilation of a model's blocks.

    A subclass decides in `parallelize` what is applied and in which order. Each step is one method, here or in the
    subclass.

    Args:
        dims: sizes of the mesh axes, except those that are "auto".
        cp, cp_attention, tp, tp_plan, sequence_parallel, async_tp, activation_checkpointing, tiled_mlp, memory: see
            `FSDP2Strategy`.
        options: see `MeshStrategy`.
    """

    def __init__(
        self,
        dims: ParallelDims,
        *,
        cp: int | Literal["auto"] = 1,
        cp_attention: CPAttention = "auto",
        tp: int | Literal["auto"] = 1,
        tp_plan: Mapping[str, str] | None = None,
        sequence_parallel: bool = True,
        async_tp: bool = False,
        activation_checkpointing: ActivationCheckpointing = None,
        tiled_mlp: TiledMLP = False,
        memory: Memory = None,
        **options: Any,
    ) -> None:
        check_modes(activation_checkpointing)
        check_method(cp_attention)
        super().__init__(replace(dims, cp=1 if cp == "auto" else cp, tp=1 if tp == "auto" else tp), **options)
        self._cp_of_node, self._tp_of_model = cp == "auto", tp == "auto"
        self.cp_attention = cp_attention
        self.tp_plan = tp_plan
        self.sequence_parallel = sequence_parallel
        self.async_tp = async_tp
        self.activation_checkpointing = activation_checkpointing
        self.tiled_mlp = tiled_mlp
        self.memory = Budget.of(memory, activation_checkpointing, tiled_mlp)
        self._context: ContextParallel | None = None
        self._replicas_to_check = False

    # --- sizes ------------------------------------------------------------------------------------------------------

    @property
    def sizes_are_open(self) -> bool:
        """Whether a size is "auto": `choose_sizes` fills it in when the run begins."""
        return self._tp_of_model or self._cp_of_node

    def choose_sizes(self) -> ParallelDims:
        """Fill in `tp="auto"` from the model's heads, then `cp="auto"` with the rest of the node.

        Raises:
            ValueError: tp is "auto" and the model's config is not known yet.
        """
        if self._tp_of_model:
            room = self.num_processes // self.requested_dims.cp
            self.requested_dims = replace(self.requested_dims, tp=choose_tp(self.lightning_module, room))
        if self._cp_of_node:
            self.requested_dims = replace(self.requested_dims, cp=self.num_processes // self.requested_dims.tp)
        self._tp_of_model = self._cp_of_node = False  # a second call keeps the sizes
        return self.requested_dims

    def ineffective_options(self) -> list[str]:
        """See `MeshProcesses.ineffective_options`."""
        idle = []
        if self.requested_dims.tp == 1 and self.tp_plan:
            idle.append("tp_plan with tp=1 (nothing is cut)")
        if self.requested_dims.cp == 1 and self.cp_attention != "auto":
            idle.append(f"cp_attention={self.cp_attention!r} with cp=1 (no sequence is split)")
        return idle + super().ineffective_options()

    def forget_run(self) -> None:
        """See `MeshStrategy.forget_run`."""
        super().forget_run()
        self._context = None

    # --- the steps of `parallelize` -----------------------------------------------------------------------------------

    @final
    @torch.no_grad()
    def broadcast_from_rank_zero(self, model: nn.Module) -> None:
        """Give every rank rank 0's values of a real model. Otherwise shards of different random weights would mix.

        A model on meta has no values yet and is left alone. Collective over the world.
        """
        if self.world_size == 1 or any(parameter.is_meta for parameter in model.parameters()):
            return
        for tensor in (*model.parameters(), *model.buffers()):
            # one tensor at a time on the device, which NCCL needs; the model may still be on the CPU
            value = tensor.detach().to(self.root_device)
            dist.broadcast(value, src=0)
            tensor.copy_(value)

    @final
    def allow_async_tp(self) -> None:
        """If `async_tp` is set, let code compiled from now on overlap tensor-parallel collectives with matmuls.

        Raises:
            ValueError: `async_tp` is set and this run cannot do it.
        """
        if self.async_tp:
            mesh = submesh(self.device_mesh, ("tp",))
            enable_async_tp(mesh, self.root_device, compiled=self.compiles, sequence_parallel=self.sequence_parallel)

    @final
    def checkpoint_activations(self, model: nn.Module, *, before_tp: bool) -> None:
        """Checkpoint the blocks of `model`, tile their MLPs and offload their inputs, as far as this run does.

        `parallelize` calls this twice, before and after tensor parallel. Without tp, checkpointing goes on before
        compilation so that the compiler sees the recomputation. With tp it goes on afterwards, because recomputation
        must see the cut parameters. The exception is "selective" with compiled blocks: only the compiler can tell
        which outputs to keep, so checkpointing goes on first. Tiles cut compiled blocks, so with them it goes on
        afterwards too. Inputs are offloaded around all of it.

        Args:
            before_tp: whether this is the call before the model is cut.

        Raises:
            ValueError: the mode is unknown, the model has no blocks, or "selective" meets compiled blocks that use
                both tp and cp.
        """
        text, later = self.block_modes, self.memory is not None
        if before_tp and (self.tiles is not None or later):
            self.prepared.find_mlps(model)
        elif not before_tp:
            self.tile_mlps()
        if text is None and not later:
            return
        if before_tp:
            self.prepared.set_modes(model, text, self.checkpoints_inside)
        if before_tp and uses(text, "selective") and self.compiles and self.dims.tp > 1 and self.dims.cp > 1:
            raise ValueError(
                "activation_checkpointing='selective' needs blocks under tensor parallel to be compiled in one piece, "
                "and cp's exchange breaks their graph. Set activation_checkpointing='full', or compile=False."
            )
        self.prepared.checkpoint(model, inside=before_tp, always=later)
        if not before_tp:
            self.prepared.offload(model, self.num_processes, self.blocks_run_alone, always=later)

    def checkpoints_inside(self, mode: Mode | None) -> bool:
        """See `MeshStrategy.checkpoints_inside`."""
        return super().checkpoints_inside(mode) and (self.dims.tp == 1 or (self.compiles and mode == "selective"))

    @final
    def split_sequences(self, model: nn.Module) -> None:
        """Context parallel: let the attention of `model` exchange data between sequence shards.

        Raises:
            ValueError: the model mixes tokens outside of attention, or cp does not divide its heads.
        """
        if self.dims.cp > 1:
            refuse_unsplittable(model)
            check_shards(model)  # type: ignore[arg-type]
            # Sequence parallel splits a shard once more, so its length must be a multiple of tp.
            method = install_attention(model, self.dims.cp, self.dims.tp, self.cp_attention)  # type: ignore[arg-type]
            at_decoder = has_tower(model)
            if at_decoder:
                split_at_decoder(model)  # type: ignore[arg-type]
            self._context = ContextParallel(self.device_mesh["cp"], method, self.dims.tp, at_decoder)

    @final
    def cut_matrices(self, model: nn.Module) -> None:
        """Tensor and sequence parallel: shard the matrices of `model` by its plan.

        Raises:
            ValueError: see `tensor_parallel` and `check_reads`.
        """
        if self.dims.tp > 1:
            given = self.tp_plan or {}
            forgotten = forgotten_rules(model, given) if isinstance(model, PreTrainedModel) else {}
            tensor_parallel(model, self.device_mesh["tp"], {**forgotten, **given}, self.sequence_parallel)
            if isinstance(model, PreTrainedModel):
                check_reads(model, given)
            self._replicas_to_check = True

    # --- running a step ---------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """See `StepRunner.forward`."""
        return forward_for_loss(model, inputs)

    def forward_backward(self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: Tensor) -> Tensor:
        """See `StepRunner.forward_backward`. The first step also checks the tensor-parallel plan.

        Raises:
            ValueError: see `check_replicas_once`.
        """
        loss = super().forward_backward(objective, micro_batches, num_tokens)
        self.check_replicas_once(objective.model)
        return loss

    @final
    def check_replicas_once(self, model: nn.Module) -> None:
        """After the first step, check that tp ranks agree on the gradients of replicated parameters. Collective.

        One check is enough: a wrong plan is wrong in the first step.

        Raises:
            ValueError: the gradients of some replicated parameters differ; the message names them.
        """
        if self._replicas_to_check:
            self._replicas_to_check = False
            check_replicas(model, self.device_mesh["tp"])

    def split_sequence(self, inputs: dict[str, Any], targets: Any) -> AbstractContextManager[Part]:
        """See `StepRunner.split_sequence`.

        Raises:
            ValueError: context parallel has no rule to split one of the inputs.
        """
        if self._context is None:
            return super().split_sequence(inputs, targets)
        return self._context.split(inputs, targets)

    def gather_sequence(self, tensor: Tensor, length: int) -> Tensor:
        """Gather the ranks' `[b, s, …]` into `[b, length, …]`. Collective, without gradient."""
        return tensor if self._context is None else self._context.gather(tensor, length)

    @final
    def shard_length(self, length: int) -> int:
        """The number of tokens that one rank holds of a sequence of `length` tokens, including padding."""
        return length if self._context is None else self._context.padded(length) // self.dims.cp


def forward_for_loss(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Run a forward whose logits stay in the form that an objective's loss takes.

    They are deferred (`DeferredLogits`), and under tensor parallel sharded over the vocabulary.
    """
    with sharded_logits(), deferred_logits():
        return model(**inputs)
