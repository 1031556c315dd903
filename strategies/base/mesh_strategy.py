"""MeshStrategy: the contract between the Trainer, the objective and a layout, and what all layouts share."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from automodel_trainer._lightning import NotebookLauncher, SubprocessLauncher, sync_rank_zero
from automodel_trainer.distributed.launch import in_notebook
from automodel_trainer.distributed.mesh import DATA_AXES, TOKEN_AXES, ParallelDims, submesh
from automodel_trainer.distributed.phase import enter_phase
from automodel_trainer.distributed.rendezvous import agent_store
from automodel_trainer.nn.deferred_logits import deferred_logits
from automodel_trainer.nn.step_cache import unchanged_weights
from automodel_trainer.strategies.base.allocator import configure_allocator
from automodel_trainer.strategies.base.clip import clip_grads_, total_grad_norm
from automodel_trainer.strategies.base.compile import wants_compile
from automodel_trainer.strategies.base.objective import MicroBatch, Objective
from automodel_trainer.strategies.base.precision import Dtypes, MeshPrecision, dtypes_of
from automodel_trainer.strategies.base.saving import SavingStrategy
from automodel_trainer.strategies.base.user_module import PreparedBlocks

Part = tuple[dict[str, Any], Any]
"""The inputs of a model's forward, and the targets of the loss."""


class MeshStrategy(SavingStrategy):
    """A layout of a model on a DeviceMesh.

    A subclass says how a model is laid out (`parallelize`) and, where it must, how one optimizer step runs
    (`forward_backward`, `gradient_sync`). Everything else is here: processes, mesh, collectives, checkpoints.

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
        launcher: Literal["auto", "subprocess", "fork", "spawn"] = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__()
        self.requested_dims = dims
        self.compile, self.compile_backend, self.compile_options = compile, compile_backend, compile_options
        self.launcher_name = launcher
        self.process_group_backend = process_group_backend
        self.timeout = timeout
        self.num_nodes = 1
        self._device_mesh: DeviceMesh | None = None
        self.prepared = PreparedBlocks()

    # --- the contract ---------------------------------------------------------------------------------------------

    @abstractmethod
    def parallelize(self, model: nn.Module) -> nn.Module:
        """Lay `model` (on meta, or real and equal on all ranks) out on the mesh, in place. Idempotent."""

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled; ValueError where they cannot be."""
        return wants_compile(self.compile, self.compile_backend, self.root_device)

    def compile_model(self, model: nn.Module) -> None:
        """Compile the blocks of `model` if this run compiles."""
        if self.compiles:
            self.prepared.compile(model, self.compile_backend, self.compile_options, self.compile)

    def finalize_parameters(self, model: nn.Module) -> None:
        """Called once the parameters of a laid-out model have their values: put them where this layout keeps them."""

    @property
    def min_layers(self) -> int:
        """Layers that a model needs at least to be laid out."""
        return 1

    @property
    def min_micro_batches(self) -> int:
        """Micro-batches that an optimizer step needs at least."""
        return 1

    @property
    def gradient_scale(self) -> float:
        """What a loss is multiplied by so that the reduced gradient is the *sum* over ranks."""
        return 1.0

    def gradient_sync(self, model: nn.Module, last: bool) -> Any:
        """A context for one micro-batch; gradients need to be reduced over ranks only in the `last`."""
        raise NotImplementedError

    def split_sequence(self, inputs: dict[str, Any], targets: Any) -> AbstractContextManager[Part]:
        """This rank's part of a micro-batch, where sequences are split over ranks; covers forward and backward."""
        return nullcontext((inputs, targets))

    def gather_sequence(self, tensor: Tensor, length: int) -> Tensor:
        """The whole `[b, length, …]` of what a rank computed of its part `[b, s, …]`. Collective, without gradient."""
        return tensor

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """One forward of the laid-out model, for an objective: its loss takes logits that are deferred."""
        with deferred_logits():
            return model(**inputs)

    def from_logits(self, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What `compute` makes of an evaluation's logits, of this shape, on every rank: some layouts have the logits
        of `forward` on one of several ranks only, and None elsewhere."""
        return compute()

    def forward_backward(self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: Tensor) -> Tensor:
        """Forward and backward of one optimizer step.

        Args:
            objective: the module that is trained.
            micro_batches: this rank's share of the global batch; the same number on every rank.
            num_tokens: supervised tokens of the whole global batch, 0-dim, on the device.

        Returns:
            this rank's token losses, summed: 0-dim, detached, on the device. Gradients are then those of
            (sum of token losses over all ranks) / num_tokens.
        """
        scale = self.gradient_scale / num_tokens.clamp(min=1)
        total = torch.zeros((), device=self.root_device)
        with unchanged_weights():
            for index, micro_batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                total += self._micro_step(objective, micro_batch, scale, last)
        return total

    def _micro_step(self, objective: Objective, micro_batch: MicroBatch, scale: Tensor, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; its summed token losses, 0-dim, detached."""
        inputs, targets = objective.split(micro_batch)
        with self.split_sequence(inputs, targets) as (part, wanted), self.gradient_sync(objective.model, last=last):
            enter_phase("forward")
            loss = objective.loss(self.forward(objective.model, part), wanted)
            enter_phase("backward")
            (loss * scale).backward()
        return loss.detach()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
        """Clip to `max_norm` (None or 0: only measure); returns the global norm before clipping, 0-dim."""
        enter_phase("clip")
        parameters = list(parameters)
        norm = total_grad_norm(parameters)
        if max_norm:
            clip_grads_(parameters, max_norm, norm)
        return norm

    # --- the mesh -------------------------------------------------------------------------------------------------

    @property
    def device_mesh(self) -> DeviceMesh:
        assert self._device_mesh is not None, "the mesh exists once the processes have started"
        return self._device_mesh

    @property
    def dims(self) -> ParallelDims:
        """The sizes of this run (`dp_shard=-1` filled in)."""
        return self.requested_dims.resolve(self.world_size)

    def choose_sizes(self) -> ParallelDims:
        """The requested sizes, after those left to the strategy ("auto") have been chosen for the connected module."""
        return self.requested_dims

    def ineffective_options(self) -> list[str]:
        """Options that were asked for and do nothing at these sizes, each with the reason."""
        return []

    def forget_run(self) -> None:
        """Let go of processes, mesh and model: what is left is the layout as it was asked for."""
        self._device_mesh = None
        self.prepared = PreparedBlocks()
        self._launcher = self._accelerator = self._precision_plugin = None
        self._lightning_module = self._model = None
        self._optimizers, self._lightning_optimizers, self.lr_scheduler_configs = [], [], []
        self.parallel_devices = self.cluster_environment = None

    @property
    def dp_size(self) -> int:
        """Ranks that see different rows of data."""
        return self.dims.dp_replicate * self.dims.dp_shard

    @property
    def dp_rank(self) -> int:
        """This rank's place among them. Ranks of one tp or cp group are neighbours and share it."""
        return self.global_rank // (self.dims.cp * self.dims.tp) % self.dp_size

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks that compute different tokens (data and context parallel): losses."""
        return self._sum_over(TOKEN_AXES, tensor)

    def sum_over_rows(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks that are fed different rows (data parallel): what is counted in whole rows."""
        return self._sum_over(DATA_AXES, tensor)

    def _sum_over(self, axes: tuple[str, ...], tensor: Tensor) -> Tensor:
        mesh = submesh(self.device_mesh, axes)
        if mesh is not None and mesh.size() > 1:
            dist.all_reduce(tensor, group=mesh.get_group())
        return tensor

    # --- dtypes ---------------------------------------------------------------------------------------------------

    @property
    def dtypes(self) -> Dtypes:
        """Dtypes of parameters and computation under the Trainer's precision."""
        return dtypes_of(str(self.precision_plugin.precision))

    # --- modules --------------------------------------------------------------------------------------------------

    @property
    def trained_module(self) -> nn.Module:
        """The module whose parameter names are the checkpoint's: an objective's model, or a user's LightningModule."""
        module = self.lightning_module
        assert module is not None
        return module.model if isinstance(module, Objective) else module

    # --- processes (Lightning's ParallelStrategy) --------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """Read by Lightning to decide on samplers and metric reduction for strategies it does not know."""
        return True

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices) if self.parallel_devices is not None else 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.dp_size, "rank": self.dp_rank}

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = self.convert_precision(plugin) if plugin is not None else None

    def convert_precision(self, plugin: Precision) -> Precision:
        """What to do with the plugin Lightning chose; a layout that casts by itself replaces it.

        Raises:
            ValueError: this layout does not offer that precision.
        """
        dtypes_of(str(plugin.precision))
        return plugin

    def set_world_ranks(self) -> None:
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        sync_rank_zero(self.global_rank)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally or self.num_processes * self.num_nodes == 1:
            return
        chosen: Literal["fork", "subprocess"] = "fork" if in_notebook() else "subprocess"
        start = chosen if self.launcher_name == "auto" else self.launcher_name
        if start == "subprocess":
            self._launcher = SubprocessLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = NotebookLauncher(self, start_method=start)

    def setup_environment(self) -> None:
        super().setup_environment()
        configure_allocator(self.root_device)
        reset_seed()
        self.set_world_ranks()
        self.choose_sizes()
        self.dims  # noqa: B018  sizes that do not fit are refused before any process waits for another
        for option in self.ineffective_options():
            rank_zero_warn(f"{option} has no effect.")
        if not dist.is_initialized():
            self._init_process_group()
        self._device_mesh = self.build_mesh()

    def build_mesh(self) -> DeviceMesh:
        return self.dims.build_mesh(self.root_device.type)

    def _init_process_group(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        cuda = self.root_device.type == "cuda"
        options: dict[str, Any] = {
            "backend": self.process_group_backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo"),
            "timeout": self.timeout,
            "rank": environment.global_rank(),
            "world_size": environment.world_size(),
            "device_id": self.root_device if cuda else None,
        }
        if environment.world_size() == 1:
            dist.init_process_group(store=dist.HashStore(), **options)
            return
        os.environ.update(MASTER_ADDR=environment.main_address, MASTER_PORT=str(environment.main_port))
        dist.init_process_group(store=agent_store(self.timeout), **options)

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self.convert(self.lightning_module, training=trainer.state.fn == TrainerFn.FITTING)
        self.layout(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def convert(self, module: pl.LightningModule, training: bool) -> None:
        """What the Trainer was asked to make of a user's own module: another dtype, synchronised batch norms."""
        if training and self._layer_sync is not None and self.world_size > 1:
            self._layer_sync.apply(module)
        if isinstance(self.precision_plugin, MeshPrecision) and not isinstance(module, Objective):
            self.precision_plugin.convert_own(module)

    def layout(self, module: pl.LightningModule) -> None:
        """Lay out what `configure_model` has not laid out already: the parts of a user's own LightningModule."""
        raise NotImplementedError

    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)

    def barrier(self, name: str | None = None) -> None:
        if not dist.is_initialized() or self.world_size == 1:
            return
        device_ids = [self.root_device.index] if self.root_device.type == "cuda" else None
        dist.barrier(device_ids=device_ids)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized() or self.world_size == 1:
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, Tensor) or not dist.is_initialized() or self.world_size == 1:
            return tensor
        reduced = tensor.detach().clone()
        average = str(reduce_op).lower() in ("mean", "avg")
        operation = dist.ReduceOp.SUM if average or str(reduce_op).lower() == "sum" else reduce_op
        if average and not reduced.is_floating_point():
            reduced = reduced.float()
        dist.all_reduce(reduced, op=operation, group=group)
        return reduced / dist.get_world_size(group) if average else reduced

    def teardown(self) -> None:
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
