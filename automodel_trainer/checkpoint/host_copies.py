"""Copies of tensors in host memory, for a save that continues while training changes the tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Copy = Callable[[str, Tensor], Tensor]
"""Copies this rank's part of a tensor to host memory. The name must be the same in every save."""


def keep(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor (any shape) without a copy, for saves that end before training continues."""
    return tensor


class HostBuffers:
    """Host memory that is allocated once and filled again by each save.

    For tensors on a GPU it is page-locked, which makes copies several times faster but is slow to allocate. A buffer
    may be reused when the save that it was filled for is written.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor of any shape, or the local shard of a DTensor. The copy is complete after `synchronize`.

        Args:
            name: name of the buffer; the same in every save.
            tensor: the tensor to copy.

        Returns:
            A tensor on the CPU, of the shape of the local shard.
        """
        local = tensor.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(local, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until all copies are complete."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()

    def clear(self) -> None:
        """Release the memory."""
        self._buffers = {}

    @property
    def nbytes(self) -> int:
        """Host memory held, in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
