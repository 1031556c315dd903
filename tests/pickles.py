"""Pickles in which a plain tensor is its bytes: torch's ways, a file each or shared memory, take ten times as long."""

from __future__ import annotations

import io
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor


class _Pickler(ForkingPickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or not _is_plain(value):
            return NotImplemented
        numbers = value.detach().contiguous().flatten()
        return _tensor, (numbers.view(torch.uint8).numpy().tobytes(), value.dtype, value.shape)


def _is_plain(tensor: Tensor) -> bool:
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and not (tensor.requires_grad or tensor.is_complex() or tensor.is_neg())


def _tensor(numbers: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if not numbers:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(numbers), dtype=dtype).reshape(shape)


def dumps(value: Any) -> bytes:
    """Of anything that `torch.multiprocessing` can send; other tensors go as it sends them."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


loads = pickle.loads
