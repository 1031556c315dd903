"""Even shards: where the streaming loader puts weights for a layout that it cannot write to directly.

The loader fills DTensors with even shards. A layout with its own buffers then takes its values from them, one parameter
at a time, so that no rank ever holds the whole model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from automodel_trainer.distributed._dtensor import StridedShard
from automodel_trainer.nn.parameters import replace_parameters


def shard_evenly(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut every parameter evenly over the ranks of `mesh`, in place. Meta stays meta, and tied parameters stay tied.

    Args:
        model: its parameters are plain tensors, or DTensors on a tensor-parallel mesh.
        mesh: `(shard, tp)`; tp has size 1 if parameters are plain.
    """
    replace_parameters(model, lambda parameter: _cut(parameter.detach(), mesh))


def _cut(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """`tensor` as a DTensor on `(shard, tp)`. Every rank has the values already, so nothing is sent."""
    if not isinstance(tensor, DTensor):
        return distribute_tensor(tensor, mesh, [_over_ranks(tensor, None), Replicate()], src_data_rank=None)
    (over_tp,) = tensor.placements
    over_ranks = _over_ranks(tensor, over_tp)
    local = distribute_tensor(tensor.to_local(), mesh[mesh.mesh_dim_names[0]], [over_ranks], src_data_rank=None)  # type: ignore[index]
    whole: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(local.to_local(), mesh, [over_ranks, over_tp], run_check=False, **whole)


def _over_ranks(tensor: Tensor, over_tp: Placement | None) -> Placement:
    """Shard the first dimension that tensor parallel has not cut; replicate if there is none."""
    taken = over_tp.dim if isinstance(over_tp, (Shard, StridedShard)) else None
    free = [dim for dim in range(tensor.ndim) if dim != taken]
    return Shard(free[0]) if free else Replicate()


@torch.no_grad()
def gather_even(tensor: Tensor) -> Tensor:
    """Gather an evenly sharded tensor to `[n, …]`: all of it, or this rank's tensor-parallel part. Collective."""
    assert isinstance(tensor, DTensor)
    placements = (Replicate(), *tensor.placements[1:])
    return tensor.redistribute(placements=placements).to_local().detach()


def over_tp(tensor: Tensor) -> Placement:
    """The placement of an evenly sharded tensor on the tp axis."""
    assert isinstance(tensor, DTensor)
    return tensor.placements[-1]


def part_shape(tensor: Tensor) -> torch.Size:
    """The shape of what `gather_even` returns.

    Raises:
        ValueError: tensor parallel cuts the tensor unevenly, in the packed way, or along neither dimension 0 nor 1.
    """
    assert isinstance(tensor, DTensor)
    placement, size = over_tp(tensor), tensor.device_mesh.size(-1)
    shape = list(tensor.shape)
    if type(placement) is Shard and placement.dim < 2 and shape[placement.dim] % size == 0:
        shape[placement.dim] //= size
    elif not isinstance(placement, Replicate):
        raise ValueError(
            f"A parameter of shape {list(shape)} is cut over tp={size} ranks as {placement}, which Megatron-FSDP "
            f"cannot shard further. Use strategy='fsdp2:tp={size}', or tp=1."
        )
    return torch.Size(shape)
