"""The memory of a device that is a CPU: every tensor that an operation makes is counted for as long as it lives."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_trainer.nn.offload import PIECE


class CountedMemory(TorchDispatchMode):
    """Stands in for `DeviceMemory`. Tensors count that are made inside of this context.

    Args:
        room: bytes that are free of 1 TiB.
        limit: bytes after which it raises what a GPU raises; None: `room`.
    """

    total = 2**40

    def __init__(self, room: int = 2**40, limit: int | None = None) -> None:
        super().__init__()
        self.room, self.limit = room, room if limit is None else limit
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or size == PIECE:  # host memory, which a GPU has beside its own
            return
        if self.now + size > self.limit:
            raise torch.OutOfMemoryError(f"{self.now + size:,} of {self.limit:,} bytes")
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size

    def allocated(self) -> int:
        return self.now

    def restart(self) -> None:
        gc.collect()
        self.most = self.now

    def peak(self) -> int:
        return self.most
