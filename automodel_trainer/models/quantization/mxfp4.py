"""mxfp4: 4-bit floats, of which a block (of 32, usually) shares a power of two. Held as a checkpoint has them.

Nothing is rounded to mxfp4 here: codes and exponents come from the files. The arithmetic is plain torch, which the
compiler turns into one pass.

Source: OCP Microscaling Formats 1.0 (E2M1 codes, E8M0 exponents).
"""

from __future__ import annotations

import torch
from torch import Tensor

from automodel_trainer.models.quantization.nf4 import QuantizedParts, deferred

SCHEME = "mxfp4"
# The values of the 16 codes: a sign, two bits of exponent, one of mantissa.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def parts(codes: Tensor, exponents: Tensor) -> QuantizedParts:
    """A weight `[experts, in, out]` as it is held.

    Args:
        codes: bytes `[experts, out, in / 2]`, two codes each, the lower half first.
        exponents: bytes `[experts, out, in / block]`.
    """
    none = torch.empty(0, device=codes.device)
    return QuantizedParts(codes, exponents, none, none, pairs().to(codes.device))


def dequantize(parts: QuantizedParts, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """The weight `[experts, in, out]`, a view of `[experts, out, in]`; see `nf4.deferred` for `after`.

    Every value is exact in bf16 and fp32.
    """
    parts = deferred(parts, after)
    wide = dtype if dtype == torch.bfloat16 else torch.float32
    values = parts.levels.to(wide)[parts.codes.int()].flatten(-2)
    blocks = values.unflatten(-1, (parts.scales.shape[-1], -1)) * powers(parts.scales).to(wide).unsqueeze(-1)
    return blocks.flatten(-2).to(dtype).mT


def pairs() -> Tensor:
    """The two values of each byte, the lower half's first: fp32 `[256, 2]`."""
    return torch.tensor([[FP4[byte & 15], FP4[byte >> 4]] for byte in range(256)])


def powers(exponents: Tensor) -> Tensor:
    """2^(byte - 127) in fp32, made of bits: a GPU's fast exponential need not be exact."""
    bits = exponents.int() << 23
    return torch.where(bits == 0, 1 << 22, bits).view(torch.float32)  # 2^-127 has no exponent bit of its own
