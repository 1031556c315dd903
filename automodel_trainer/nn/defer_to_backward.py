"""What a backward makes of packed weights is made there, also where it is compiled."""

from __future__ import annotations

from torch import Tensor


def defer_to_backward(codes: Tensor, gradient: Tensor) -> Tensor:
    """The same codes, for a backward that unpacks or transposes them; `gradient` is what it begins with.

    What a backward does to weights alone the compiler does in the forward, and keeps the result from there: of packed
    weights the unpacked ones, of a sharded model's the whole ones. What depends on the gradient it leaves where it is.
    """
    corner = gradient[(slice(1),) * gradient.ndim]
    return codes ^ (corner.isnan().any().to(codes.dtype) & 0)
