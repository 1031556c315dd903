"""Where a strategy starts without a Trainer: under torchrun or srun, in a running process group, or alone."""

from __future__ import annotations

import os
from typing import Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.fabric.plugins.environments import TorchElasticEnvironment as TorchrunEnvironment
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins import Precision

from automodel_trainer.strategies.base.precision import canonical_precision

Device = Literal["auto", "cpu", "cuda"]


class RunningGroup(ClusterEnvironment):
    """The ranks of a process group that the user has started."""

    creates_processes_externally = True  # type: ignore[assignment]

    @property
    def main_address(self) -> str:
        """Unused: the group exists."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Unused: the group exists."""
        return int(os.environ.get("MASTER_PORT", 0))

    @staticmethod
    def detect() -> bool:
        """Whether there is a process group."""
        return dist.is_initialized()

    def world_size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        """Nothing: the group decides."""

    def global_rank(self) -> int:
        """This rank."""
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        """Nothing: the group decides."""

    def local_rank(self) -> int:
        """This rank's index on its node."""
        return int(os.environ.get("LOCAL_RANK", dist.get_rank() % ranks_per_node(self)))

    def node_rank(self) -> int:
        """The index of this node."""
        return dist.get_rank() // ranks_per_node(self)


def environment() -> ClusterEnvironment:
    """What says which rank this process is: a running process group, torchrun's variables, srun, or nothing."""
    if dist.is_initialized():
        return RunningGroup()
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return TorchrunEnvironment()
    return SLURMEnvironment() if SLURMEnvironment.detect() else LightningEnvironment()


def ranks_per_node(where: ClusterEnvironment) -> int:
    """The number of ranks on this node."""
    world = where.world_size()
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if isinstance(where, SLURMEnvironment):
        return world // int(os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", 1)))
    return min(world, torch.cuda.device_count() or world)


def accelerator_of(device: Device) -> Accelerator:
    """Lightning's accelerator for a kind of device.

    Raises:
        ValueError: the kind is unknown, or there is no such device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r} is unknown. Allowed: 'auto', 'cpu', 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no GPU here. Give device='cpu'.")
    return CUDAAccelerator() if device != "cpu" and torch.cuda.is_available() else CPUAccelerator()


def precision_plugin(precision: str | int | None) -> Precision:
    """Lightning's plugin for a name of a precision, as `Trainer(precision=…)` takes it."""
    plugin = Precision()
    plugin.precision = canonical_precision(precision)  # type: ignore[assignment]
    return plugin
