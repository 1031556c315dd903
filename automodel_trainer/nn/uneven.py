"""DTensors with uneven shards, which DTensor itself would gather and split wrongly.

Megatron-FSDP concatenates the parameters of a unit and splits the result over the ranks, at row boundaries. One rank
may hold more of a parameter than another, or nothing of it. A DTensor knows only its placements, and `Shard(0)` means
even shards. We therefore mark each such parameter with the offset of this rank's shard. The functions here use the
offset to gather, fill and save it.
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

from automodel_trainer.distributed._dtensor import local_tensor

_OFFSETS = "_shard_offsets"


def mark_uneven(tensor: Tensor, offsets: Sequence[int]) -> None:
    """Mark a DTensor of any shape: this rank's shard begins at `offsets`, one per dimension of the whole tensor."""
    setattr(tensor, _OFFSETS, tuple(offsets))


def is_uneven(tensor: Tensor) -> bool:
    """Whether `tensor` was marked by `mark_uneven`."""
    return hasattr(tensor, _OFFSETS)


def holds_nothing(tensor: Tensor) -> bool:
    """Whether this rank's shard of an uneven DTensor is empty. An optimizer then has no state for it here."""
    return is_uneven(tensor) and local_tensor(tensor).numel() == 0


@torch.no_grad()
def gather_uneven(tensor: Tensor) -> Tensor:
    """Gather the whole tensor, of shape `tensor.shape`. Collective.

    Every rank writes its shard into zeros, and an all-reduce over the sharded mesh axes sums them.
    """
    assert isinstance(tensor, DTensor)
    local = local_tensor(tensor).detach()
    full = torch.zeros(tensor.shape, dtype=local.dtype, device=local.device)
    if local.numel():
        full[_region(tensor)] = local
    for axis, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            dist.all_reduce(full, group=tensor.device_mesh.get_group(axis))
    return full


@torch.no_grad()
def assign_uneven(tensor: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full` (a whole tensor, of shape `tensor.shape`) into its shard, in place."""
    local = local_tensor(tensor)
    if local.numel():
        local.copy_(full[_region(tensor)])


def detached(tensor: Tensor) -> Tensor:
    """`tensor.detach()`. The result of an uneven tensor keeps its mark and can be read and written by DCP."""
    return placed_like(tensor.detach(), tensor) if is_uneven(tensor) else tensor.detach()


def placed_like(value: Tensor, owner: Tensor) -> Tensor:
    """Mark `value` as uneven like `owner`, and tell DCP where its shard lies. Returns `value`.

    Args:
        value: a DTensor that is sharded like `owner`, such as its optimizer state.
        owner: a parameter. If it is even, or has another shape than `value`, nothing is done.
    """
    if not is_uneven(owner) or value.shape != owner.shape:
        return value
    assert isinstance(value, DTensor)
    offsets = getattr(owner, _OFFSETS)
    mark_uneven(value, offsets)
    local: Any = local_tensor(value)
    chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=local.size())
    chunks = [chunk] if local.numel() else []

    def write_items(name: str, tensor: DTensor) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(local_tensor(tensor))
        data = TensorWriteData(chunk=chunk, properties=properties, size=tensor.size())
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data) for _ in chunks]

    # DCP asks a DTensor's local tensor for these two methods and uses even chunks if it has none.
    local.__create_chunk_list__ = lambda: chunks
    local.__create_write_items__ = write_items
    return value


def empty_like_shard(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialized DTensor of dtype `dtype` that has the shape, shards and mark of the uneven `owner`."""
    assert isinstance(owner, DTensor)
    local = torch.empty_like(local_tensor(owner).detach(), dtype=dtype)
    whole: dict[str, Any] = {"shape": owner.shape, "stride": owner.stride()}
    value = DTensor.from_local(local, owner.device_mesh, owner.placements, run_check=False, **whole)
    return placed_like(value, owner)


def _region(tensor: Tensor) -> tuple[slice, ...]:
    sizes = local_tensor(tensor).shape
    return tuple(slice(start, start + size) for start, size in zip(getattr(tensor, _OFFSETS), sizes))
