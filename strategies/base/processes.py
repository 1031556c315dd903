"""Processes and the mesh they form: how they start, which rank this one is, and how ranks communicate."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal, Self, final

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from automodel_trainer._lightning import NotebookLauncher, SubprocessLauncher, sync_rank_zero
from automodel_trainer.distributed.launch import in_notebook
from automodel_trainer.distributed.mesh import DATA_AXES, TOKEN_AXES, ParallelDims, submesh
from automodel_trainer.distributed.rendezvous import agent_store
from automodel_trainer.strategies.base.allocator import configure_allocator
from automodel_trainer.strategies.base.precision import Dtypes, dtypes_of
from automodel_trainer.strategies.base.start import (
    Device,
    accelerator_of,
    environment,
    precision_plugin,
    ranks_per_node,
)

Launcher = Literal["auto", "subprocess", "fork", "spawn"]


@lru_cache(maxsize=16)
def _resolved(dims: ParallelDims, world_size: int) -> ParallelDims:
    """`dims.resolve`, which every step asks for several times."""
    return dims.resolve(world_size)


class MeshProcesses(ParallelStrategy):
    """Starts processes, builds the mesh, and sums over its axes. It knows nothing about models.

    Args:
        dims: sizes of the mesh axes.
        launcher: how `devices=N` starts its processes if torchrun or srun did not.
        process_group_backend: None: gloo on CPU; on CUDA NCCL, with gloo for CPU tensors.
        timeout: how long a collective waits for a missing rank.
    """

    def __init__(
        self, dims: ParallelDims, launcher: Launcher, process_group_backend: str | None, timeout: timedelta
    ) -> None:
        super().__init__()
        self.requested_dims = dims
        self.launcher_name = launcher
        self.process_group_backend = process_group_backend
        self.timeout = timeout
        self.num_nodes = 1
        self.replicas = 1  # groups of such processes that come and go, each with a mesh of its own
        self.groups_met = 1  # of these, in the last step
        self._device_mesh: DeviceMesh | None = None
        self._group: Any = None
        self._owns_group = False

    # --- what a strategy may override ---------------------------------------------------------------------------------

    def choose_sizes(self) -> ParallelDims:
        """The requested sizes. A strategy that offers "auto" resolves it here, for the connected module."""
        return self.requested_dims

    def ineffective_options(self) -> list[str]:
        """Options that the user set and that do nothing at these sizes, each with the reason."""
        return []

    def build_mesh(self) -> DeviceMesh:
        """Build the mesh over the world. Called once, when the process group exists."""
        return self.dims.build_mesh(self.root_device.type)

    def convert_precision(self, plugin: Precision) -> Precision:
        """Check the plugin that Lightning chose, and return the one to use. A layout that casts itself replaces it.

        Raises:
            ValueError: this layout does not offer that precision.
        """
        dtypes_of(str(plugin.precision))
        return plugin

    # --- sizes and ranks --------------------------------------------------------------------------------------------

    @property
    @final
    def device_mesh(self) -> DeviceMesh:
        """The mesh of this run. It exists once the processes have started."""
        assert self._device_mesh is not None, "the mesh exists once the processes have started"
        return self._device_mesh

    @property
    @final
    def dims(self) -> ParallelDims:
        """The sizes of this run, with `dp_shard=-1` resolved.

        Raises:
            ValueError: the sizes do not fit the number of ranks.
        """
        return _resolved(self.requested_dims, self.world_size)

    @property
    @final
    def dp_size(self) -> int:
        """The number of ranks that see different rows of data."""
        return self.dims.dp_replicate * self.dims.dp_shard

    @property
    @final
    def dp_rank(self) -> int:
        """This rank's index among the `dp_size` ranks. Ranks of one tp or cp group share it."""
        # The mesh is (pp, dp, cp, tp), the last axis varying fastest: cp and tp ranks are neighbours.
        return self.global_rank // (self.dims.cp * self.dims.tp) % self.dp_size

    @final
    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` `[…]` in place over the ranks that compute different tokens (data and context parallel).

        Use it for values that add up over tokens, such as losses.
        """
        return self._sum_over(TOKEN_AXES, tensor)

    @final
    def sum_over_rows(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` `[…]` in place over the ranks that see different rows (data parallel).

        Use it for values that are counted over whole rows.
        """
        return self._sum_over(DATA_AXES, tensor)

    @final
    def sum_over_sequence(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` `[…]` in place over the ranks that hold parts of the same rows (context parallel)."""
        return self._sum_over(("cp",), tensor)

    def _sum_over(self, axes: tuple[str, ...], tensor: Tensor) -> Tensor:
        mesh = submesh(self.device_mesh, axes)
        if mesh is not None and mesh.size() > 1:
            dist.all_reduce(tensor, group=mesh.get_group())
        return tensor

    @property
    @final
    def is_distributed(self) -> bool:
        """Whether there are several ranks. Lightning then adds samplers and reduces metrics over ranks."""
        return self.world_size > 1

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    # A single process needs no launcher that tells it its rank: a script in a Slurm job may run without srun.

    @property
    def _alone(self) -> bool:
        return self.num_processes * self.num_nodes == 1

    @property
    def local_rank(self) -> int:
        """The rank of this process on its node."""
        return 0 if self._alone else super().local_rank

    @property
    def node_rank(self) -> int:
        """The rank of this node."""
        return 0 if self._alone else super().node_rank

    @property
    def global_rank(self) -> int:
        """The rank of this process among all."""
        return 0 if self._alone else super().global_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return 1 if self._alone else super().world_size

    @property
    @final
    def num_processes(self) -> int:
        """The number of ranks on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The arguments of the samplers that Lightning adds: ranks of one cp or tp group get the same rows."""
        return {"num_replicas": self.dp_size, "rank": self.dp_rank}

    # --- dtypes -----------------------------------------------------------------------------------------------------

    @property
    @final
    def dtypes(self) -> Dtypes:
        """The dtypes of parameters and computation under the Trainer's precision."""
        return dtypes_of(str(self.precision_plugin.precision))

    @property
    def precision_plugin(self) -> Precision:
        """The plugin in use. Assigning one passes it through `convert_precision`."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # Lightning assigns the plugin that it made from `Trainer(precision=...)`. Convert or refuse it here.
        self._precision_plugin = self.convert_precision(plugin) if plugin is not None else None

    # --- starting and ending ----------------------------------------------------------------------------------------

    @final
    def set_world_ranks(self) -> None:
        """Tell the environment and Lightning's rank-zero helpers which rank this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        sync_rank_zero(self.global_rank)

    def _configure_launcher(self) -> None:
        """Choose how the other processes start, unless torchrun or srun has started them or there is only one."""
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
        """Start the process group and build the mesh.

        Raises:
            ValueError: the sizes do not fit the number of ranks.
        """
        super().setup_environment()
        configure_allocator(self.root_device)  # before anything is allocated
        self.set_world_ranks()
        if self.world_size > 1:  # ranks that were started at different moments draw the same numbers from here on
            reset_seed()
        self.choose_sizes()
        self.dims  # noqa: B018  raises for sizes that do not fit, before any process waits for another
        if self.world_size == 1:  # Lightning takes a process group for several ranks
            warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\(.*sync_dist=True")
        for option in self.ineffective_options():
            rank_zero_warn(f"{option} has no effect.")
        if dist.is_initialized() and dist.get_world_size() != self.world_size:
            dist.destroy_process_group()  # a forked worker inherits that of an earlier run on one device
        if not dist.is_initialized():
            self._init_process_group()
        self._device_mesh, self._group = self.build_mesh(), dist.group.WORLD

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
        if environment.world_size() == 1:  # one rank needs no port
            dist.init_process_group(store=dist.HashStore(), **options)
            return
        os.environ.update(MASTER_ADDR=environment.main_address, MASTER_PORT=str(environment.main_port))
        dist.init_process_group(store=agent_store(self.timeout), **options)

    @property
    @final
    def has_started(self) -> bool:
        """Whether the processes and the mesh exist, and belong to the process group that runs now."""
        return self._device_mesh is not None and dist.is_initialized() and self._group is dist.group.WORLD

    @final
    def start(self, precision: str | int | None = None, device: Device = "auto") -> Self:
        """Start without a Trainer: the process group, the mesh, this rank's device. Collective.

        The ranks are those of a running process group; else those that torchrun or srun started; else this process is
        the only one. A second call does nothing.

        Args:
            precision: as `Trainer(precision=…)` takes it; None: fp32.
            device: "auto" takes the GPU if there is one.

        Returns:
            the strategy.

        Raises:
            ValueError: the sizes do not fit the number of ranks, the precision is not offered, or a Trainer has taken
                this strategy.
        """
        if self.has_started:
            return self
        if self._device_mesh is not None:  # of a group that has ended
            self.forget_run()
        if self._accelerator is not None:
            raise ValueError(
                f"This {type(self).__name__} belongs to a Trainer, which starts it in fit. Build the model in the "
                "module's configure_model, or give fit the model's folder; or make another strategy and start() it."
            )
        where = environment()
        per_node, accelerator = ranks_per_node(where), accelerator_of(device)
        self.num_nodes = where.world_size() // per_node
        cuda = accelerator.name() == "cuda"
        self.parallel_devices = [torch.device("cuda", i) if cuda else torch.device("cpu") for i in range(per_node)]
        self._owns_group = not dist.is_initialized()
        try:
            self.cluster_environment, self.accelerator = where, accelerator
            self.precision_plugin = precision_plugin(precision)
            self.setup_environment()
        except ValueError:
            self.forget_run()
            raise
        return self

    @final
    def stop(self) -> None:
        """End what `start` began, the process group too unless it ran before. Models keep their tensors. Collective."""
        self.forget_run()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        self._owns_group = False

    def forget_run(self) -> None:
        """Release the processes and the mesh. The requested layout remains, ready for another run."""
        self._device_mesh = self._group = None
        self._launcher = self._accelerator = self._precision_plugin = None
        self._lightning_module = self._model = None
        self._optimizers, self._lightning_optimizers, self.lr_scheduler_configs = [], [], []
        self.parallel_devices = self.cluster_environment = None

    def teardown(self) -> None:
        """Tear down what Lightning gave this strategy. The model stays where it is: another `fit` may follow."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    # --- collectives that Lightning calls -----------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks. A no-op on one rank."""
        if not dist.is_initialized() or self.world_size == 1:
            return
        # Without it NCCL guesses the device from the rank, and can guess wrong.
        device_ids = [self.root_device.index] if self.root_device.type == "cuda" else None
        dist.barrier(device_ids=device_ids)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of rank `src`, on every rank. Collective."""
        if not dist.is_initialized() or self.world_size == 1:
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over ranks into a new one. Other objects are returned as they are. Collective.

        Args:
            tensor: `[…]`, the same shape on every rank.
            group: the ranks; None: all of them.
            reduce_op: "mean" or "avg" (integers are averaged as fp32), "sum", or a `ReduceOp`.
        """
        if not isinstance(tensor, Tensor) or not dist.is_initialized() or self.world_size == 1:
            return tensor
        reduced = tensor.detach().clone()
        # gloo has no average: sum, then divide
        average = str(reduce_op).lower() in ("mean", "avg")
        operation = dist.ReduceOp.SUM if average or str(reduce_op).lower() == "sum" else reduce_op
        if average and not reduced.is_floating_point():
            reduced = reduced.float()
        dist.all_reduce(reduced, op=operation, group=group)
        return reduced / dist.get_world_size(group) if average else reduced
