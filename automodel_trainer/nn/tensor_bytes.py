"""The bytes of a tensor, also of one that is made of others."""

from __future__ import annotations

from torch import Tensor


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a local tensor of any shape; those of the tensors inside quantized weights or a state in 8 bits."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(bytes_of(getattr(tensor, name)) for name in names)
