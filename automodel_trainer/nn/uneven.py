"""DTensors whose shards are not even: what DTensor's own gathering and cutting would get wrong.

Megatron-FSDP lays the parameters of a unit one after another and cuts the whole row of them, between two rows of a
matrix: one rank has more of a parameter than another, or nothing. A DTensor only knows its placements, and `Shard(0)`
means even shards. So such a parameter is marked with the place where this rank's shard begins, and whoever gathers,
fills or saves it looks there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate

_OFFSETS = "_shard_offsets"


def mark_uneven(tensor: Tensor, offsets: Sequence[int]) -> None:
    """Say that this rank's part of `tensor` begins at `offsets`, one per dimension of the whole tensor."""
    setattr(tensor, _OFFSETS, tuple(offsets))


def is_uneven(tensor: Tensor) -> bool:
    return hasattr(tensor, _OFFSETS)


def holds_nothing(tensor: Tensor) -> bool:
    """Whether this rank's shard of an uneven DTensor is empty, so that an optimizer has no state for it here."""
    return is_uneven(tensor) and local_part(tensor).numel() == 0


def local_part(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather_uneven(tensor: Tensor) -> Tensor:
    """The whole tensor. Collective: every rank adds its part to zeros, over the axes that the tensor is cut along."""
    assert isinstance(tensor, DTensor)
    local = tensor._local_tensor.detach()
    full = torch.zeros(tensor.shape, dtype=local.dtype, device=local.device)
    if local.numel():
        full[_region(tensor)] = local
    for axis, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            dist.all_reduce(full, group=tensor.device_mesh.get_group(axis))
    return full


@torch.no_grad()
def assign_uneven(tensor: Tensor, full: Tensor) -> None:
    """Write this rank's part of a whole tensor into it."""
    local = local_part(tensor)
    if local.numel():
        local.copy_(full[_region(tensor)])


def detached(tensor: Tensor) -> Tensor:
    """`tensor.detach()`; of a marked one, what `torch.distributed.checkpoint` can read and write."""
    return placed_like(tensor.detach(), tensor) if is_uneven(tensor) else tensor.detach()


def placed_like(value: Tensor, owner: Tensor) -> Tensor:
    """`value`, a DTensor cut as `owner` is (its optimizer state, say), marked as it and telling DCP where it lies."""
    if not is_uneven(owner) or value.shape != owner.shape:
        return value
    assert isinstance(value, DTensor)
    offsets = getattr(owner, _OFFSETS)
    mark_uneven(value, offsets)
    local: Any = value._local_tensor
    chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=local.size())
    chunks = [chunk] if local.numel() else []

    def write_items(name: str, tensor: DTensor) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(tensor._local_tensor)
        data = TensorWriteData(chunk=chunk, properties=properties, size=tensor.size())
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data) for _ in chunks]

    local.__create_chunk_list__ = lambda: chunks
    local.__create_write_items__ = write_items
    return value


def empty_like_shard(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of that dtype, cut and marked as the uneven `owner`."""
    assert isinstance(owner, DTensor)
    local = torch.empty_like(owner._local_tensor.detach(), dtype=dtype)
    whole: dict[str, Any] = {"shape": owner.shape, "stride": owner.stride()}
    value = DTensor.from_local(local, owner.device_mesh, owner.placements, run_check=False, **whole)
    return placed_like(value, owner)


def _region(tensor: Tensor) -> tuple[slice, ...]:
    sizes = local_part(tensor).shape
    return tuple(slice(start, start + size) for start, size in zip(getattr(tensor, _OFFSETS), sizes))
