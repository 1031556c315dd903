"""NF4 weights as dense ones in one pass over memory, on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_trainer.models.quantization.nf4 import BLOCK

_BLOCKS = 16  # of 64 elements, for a program


def dequantize_in_one_pass(codes: Tensor, scales: Tensor, factors: Tensor, mean: Tensor, levels: Tensor) -> Tensor:
    """The elements `[n]` of `QuantizedParts` in the dtype of `levels`; bit for bit what torchao computes.

    Args:
        codes: uint8 `[n / 2]`; the upper half of a byte is the first element.
        scales: int8 `[n / 64]`.
        factors: that scales are divided by, `[n / 64 / scale_block]`.
        mean: of the scales, 0-dim.
        levels: the 16 values of NF4.
    """
    blocks = scales.numel()
    out = torch.empty(blocks * BLOCK, dtype=levels.dtype, device=codes.device)
    scale_block = blocks // factors.numel()
    with torch.cuda.device_of(codes):
        _dequantize[(triton.cdiv(blocks, _BLOCKS),)](
            codes, scales, factors, mean, levels, out, blocks, scale_block, BYTES=BLOCK // 2, BLOCKS=_BLOCKS
        )
    return out


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    codes, scales, factors, mean, levels, out, blocks, scale_block, BYTES: tl.constexpr, BLOCKS: tl.constexpr
):
    """Results are rounded to the dtype of `out` after every operation, as torch does."""
    dtype = out.dtype.element_ty
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    factor = tl.load(factors + block // scale_block, mask=there, other=1.0)
    scale = tl.div_rn(tl.load(scales + block, mask=there, other=0).to(tl.float32), factor.to(tl.float32)).to(dtype)
    scale = (scale.to(tl.float32) + tl.load(mean).to(tl.float32)).to(dtype).to(tl.float32)[:, None]
    byte = tl.arange(0, BYTES)[None, :]
    pair = tl.load(codes + block[:, None] * BYTES + byte, mask=there[:, None], other=0).to(tl.int32)
    first = (tl.load(levels + (pair >> 4)).to(tl.float32) * scale).to(dtype)
    second = (tl.load(levels + (pair & 15)).to(tl.float32) * scale).to(dtype)
    place = block[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out + place, tl.interleave(first, second), mask=there[:, None])
