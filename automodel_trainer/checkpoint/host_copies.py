"""Copies of tensors in host memory, as they were at one moment, for a save that goes on while training does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Copy = Callable[[str, Tensor], Tensor]
"""Takes a tensor under a name that is the same in every save; returns this rank's part of it in host memory."""


def keep(name: str, tensor: Tensor) -> Tensor:
    """No copy: the save is over before training goes on."""
    return tensor


class HostBuffers:
    """Host memory that each save copies into anew: allocated once, page-locked where there is a GPU (that is several
    times as fast to copy into, but slow to allocate).

    A buffer is free again when the save that it was filled for has been written.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a tensor (of a DTensor: of its local part). It is complete after `synchronize`."""
        local = tensor.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(local, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until all copies have arrived."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()

    def clear(self) -> None:
        self._buffers = {}

    @property
    def nbytes(self) -> int:
        """Host memory held, in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
