"""What strategies share that cut a model inside of its blocks: tensor, sequence and context parallel, checkpointing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from automodel_trainer.distributed.mesh import ParallelDims, submesh
from automodel_trainer.nn.deferred_logits import deferred_logits
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy
from automodel_trainer.strategies.base.objective import MicroBatch, Objective, Part
from automodel_trainer.strategies.context.attention import CPAttention, check_method, install_attention
from automodel_trainer.strategies.context.split import ContextParallel
from automodel_trainer.strategies.tensor.async_tp import enable_async_tp
from automodel_trainer.strategies.tensor.check import check_replicas
from automodel_trainer.strategies.tensor.loss_parallel import sharded_logits
from automodel_trainer.strategies.tensor.parallelize import tensor_parallel
from automodel_trainer.strategies.tensor.size import choose_tp

ActivationCheckpointing = Literal["full", "selective"] | None


class InnerParallelStrategy(MeshStrategy):
    """Tensor, sequence and context parallel, activation checkpointing and compilation of a model's blocks.

    A subclass says in `parallelize` what is applied and in which order; each step is one method here or there.

    Args:
        dims: sizes of the mesh axes but for those that are "auto".
        cp, cp_attention, tp, tp_plan, sequence_parallel, async_tp, activation_checkpointing: see `FSDP2Strategy`.
        options: of `MeshStrategy`.
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
        **options: Any,
    ) -> None:
        check_method(cp_attention)
        super().__init__(replace(dims, cp=1 if cp == "auto" else cp, tp=1 if tp == "auto" else tp), **options)
        self._cp_of_node, self._tp_of_model = cp == "auto", tp == "auto"
        self.cp_attention = cp_attention
        self.tp_plan = tp_plan
        self.sequence_parallel = sequence_parallel
        self.async_tp = async_tp
        self.activation_checkpointing = activation_checkpointing
        self._context: ContextParallel | None = None
        self._replicas_to_check = False

    # --- sizes ------------------------------------------------------------------------------------------------------

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

    # --- steps of laying a model out, for `parallelize` -------------------------------------------------------------

    @final
    @torch.no_grad()
    def broadcast_from_rank_zero(self, model: nn.Module) -> None:
        """Give every rank *rank 0's* values of a real model. Ranks that built different random weights would mix them.

        A model on meta has no values yet, and is left alone. Collective over the world.
        """
        if self.world_size == 1 or any(parameter.is_meta for parameter in model.parameters()):
            return
        for tensor in (*model.parameters(), *model.buffers()):
            value = tensor.detach().to(self.root_device)
            dist.broadcast(value, src=0)
            tensor.copy_(value)

    @final
    def allow_async_tp(self) -> None:
        """Let what is compiled from now on overlap tensor parallel's collectives with matmuls, if that was asked for.

        Raises:
            ValueError: it was asked for and cannot be had.
        """
        if self.async_tp:
            mesh = submesh(self.device_mesh, ("tp",))
            enable_async_tp(mesh, self.root_device, compiled=self.compiles, sequence_parallel=self.sequence_parallel)

    @final
    def checkpoint_activations(self, model: nn.Module, *, before_tp: bool) -> None:
        """Checkpoint the blocks of `model`, if that was asked for and this is the moment.

        Without tp it happens before compilation, so that the compiler sees what is recomputed. With tp it happens
        after: what is recomputed must find the parameters cut. Except in compiled blocks with "selective", where only
        the compiler can tell which outputs to keep.

        Args:
            before_tp: the model has not been cut yet.

        Raises:
            ValueError: an unknown mode, no blocks, or "selective" of compiled blocks that both tp and cp take apart.
        """
        mode, dims = self.activation_checkpointing, self.dims
        if not mode or before_tp != (dims.tp == 1 or (self.compiles and mode == "selective")):
            return
        if before_tp and dims.tp > 1 and dims.cp > 1:
            raise ValueError(
                "activation_checkpointing='selective' needs blocks that tensor parallel cut to be compiled in one "
                "piece, and the exchange of cp takes them apart. Set activation_checkpointing='full', or compile=False."
            )
        self.prepared.checkpoint(model, mode)

    @final
    def split_sequences(self, model: nn.Module) -> None:
        """Context parallel: attention of `model` exchanges what sequence shards need of each other.

        Raises:
            ValueError: the model mixes tokens outside of attention, or its heads do not divide.
        """
        if self.dims.cp > 1:
            method = install_attention(model, self.dims.cp, self.dims.tp, self.cp_attention)  # type: ignore[arg-type]
            self._context = ContextParallel(self.device_mesh["cp"], method, multiple_of=self.dims.tp)

    @final
    def cut_matrices(self, model: nn.Module) -> None:
        """Tensor and sequence parallel: cut the matrices of `model` by its plan.

        Raises:
            ValueError: see `expand_plan`.
        """
        if self.dims.tp > 1:
            tensor_parallel(model, self.device_mesh["tp"], self.tp_plan, self.sequence_parallel)
            self._replicas_to_check = True

    # --- running a step ---------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        return forward_for_loss(model, inputs)

    def forward_backward(self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: Tensor) -> Tensor:
        loss = super().forward_backward(objective, micro_batches, num_tokens)
        self.check_replicas_once(objective.model)
        return loss

    @final
    def check_replicas_once(self, model: nn.Module) -> None:
        """After the first step: ranks of tp must agree on gradients of what they replicate. Collective.

        Raises:
            ValueError: names the parameters whose gradients differ. A plan that is wrong is wrong in the first step.
        """
        if self._replicas_to_check:
            self._replicas_to_check = False
            check_replicas(model, self.device_mesh["tp"])

    def split_sequence(self, inputs: dict[str, Any], targets: Any) -> AbstractContextManager[Part]:
        if self._context is None:
            return super().split_sequence(inputs, targets)
        return self._context.split(inputs, targets)

    def gather_sequence(self, tensor: Tensor, length: int) -> Tensor:
        return tensor if self._context is None else self._context.gather(tensor, length)

    @final
    def shard_length(self, length: int) -> int:
        """Tokens of a rank's part of a sequence of `length` tokens, padding included."""
        return length if self._context is None else self._context.padded(length) // self.dims.cp


def forward_for_loss(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """One forward whose logits stay as an objective's loss takes them: deferred, and sharded over the vocabulary."""
    with sharded_logits(), deferred_logits():
        return model(**inputs)
