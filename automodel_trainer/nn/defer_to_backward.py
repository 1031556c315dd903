"""Keep work on quantized weights in the backward, also when the backward is compiled."""

from __future__ import annotations

from torch import Tensor


def defer_to_backward(codes: Tensor, gradient: Tensor) -> Tensor:
    """Return `codes` unchanged, but make them depend on `gradient`.

    The compiler moves any part of a backward that depends on weights alone into the forward and keeps the result until
    the backward. For quantized weights that would keep the dequantized ones, and for a sharded model the gathered ones.
    It does not move work that depends on the gradient.

    Args:
        codes: integer tensor of any shape that the backward dequantizes or transposes.
        gradient: output gradient that the backward starts from, any shape.
    """
    # One element of the gradient is enough for the dependency; `& 0` makes the XOR a no-op.
    corner = gradient[(slice(1),) * gradient.ndim]
    return codes ^ (corner.isnan().any().to(codes.dtype) & 0)
