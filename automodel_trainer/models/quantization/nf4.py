"""NF4 (arXiv 2305.14314): the tensors that torchao or bitsandbytes quantizes a weight into.

Every 64 elements share a scale. In a large weight every 256 scales share a second scale.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from automodel_trainer.nn.defer_to_backward import defer_to_backward

BLOCK = 64  # elements that share a scale
SCALE_BLOCK = 256  # scales that share a second scale
SCHEMES = ("nf4", "bnb-nf4")


@dataclass(frozen=True)
class QuantizedParts:
    """`n` quantized elements.

    Args:
        codes: uint8 `[n / 2]`, two elements a byte. (fp8: uint8 `[out, in]`, one element a byte; mxfp4: see
            `mxfp4.parts`.)
        scales: one for each block, `[n / 64]`: 8 bits, or fp32 if they are not quantized. (fp8: fp32 `[out]`.)
        factors: the second scales, `[n / 64 / scale_block]`; empty if scales are fp32.
        mean: of all scales, 0-dim. A shard holds the mean of the whole weight.
        levels: the table that codes (torchao, mxfp4) or scales (bitsandbytes) index into.
    """

    codes: Tensor
    scales: Tensor
    factors: Tensor
    mean: Tensor
    levels: Tensor


def deferred(parts: QuantizedParts, after: Tensor | None) -> QuantizedParts:
    """The same parts; what a compiled backward computes from them stays there (`defer_to_backward`).

    Args:
        after: the output gradient that the backward starts from, any shape; None outside of a backward.
    """
    if after is None:
        return parts
    found = {field.name: getattr(parts, field.name) for field in fields(parts)}
    return replace(parts, **{n: defer_to_backward(t, after) for n, t in found.items() if not t.is_floating_point()})
