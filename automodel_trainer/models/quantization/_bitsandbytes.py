"""NF4 by bitsandbytes (0.50)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_trainer.models.quantization.nf4 import BLOCK, SCALE_BLOCK, QuantizedParts, deferred


def functional() -> Any:
    """`bitsandbytes.functional`.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ValueError("lora quantize='bnb-nf4' needs bitsandbytes: pip install 'automodel-trainer[bnb]'.") from error
    return bitsandbytes.functional


def quantize(weight: Tensor, scale_block: int) -> QuantizedParts:
    """A dense weight of any shape as parts.

    Scales are quantized too if `scale_block` is bitsandbytes' own; it has kernels for no other size on every device.
    """
    nested = scale_block == SCALE_BLOCK
    rows = weight.reshape(-1, BLOCK).contiguous()
    codes, state = functional().quantize_4bit(rows, blocksize=BLOCK, compress_statistics=nested, quant_type="nf4")
    codes = codes.reshape(-1)
    if not nested:
        none = state.absmax.new_empty(0)
        return QuantizedParts(codes, state.absmax, none, state.absmax.new_zeros(()), none)
    return QuantizedParts(codes, state.absmax, state.state2.absmax, state.offset, state.state2.code)


def dequantize(parts: QuantizedParts, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """The elements in row-major order, `[n]`; see `nf4.deferred` for `after`."""
    parts = deferred(parts, after)
    bnb, scales = functional(), parts.scales
    if parts.factors.numel():
        options = {"absmax": parts.factors, "code": parts.levels, "blocksize": SCALE_BLOCK}
        scales = bnb.dequantize_blockwise(scales, **options) + parts.mean
    shape = torch.Size((scales.numel(), BLOCK))
    state = bnb.QuantState(scales, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return bnb.dequantize_4bit(parts.codes.view(-1, 1), state).reshape(-1)
