"""NF4 as torchao packs it, and fp8 as it trains with; what is private there is named here (torchao 0.18)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_trainer.models.quantization.nf4 import BLOCK, Parts


def nf4_tensor() -> Any:
    """torchao's NF4Tensor, which holds weights of one or two dimensions.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.quantization import NF4Tensor
    except ImportError as error:
        raise ValueError("lora quantize='nf4' needs torchao: pip install 'automodel-trainer[fp8]'.") from error
    return NF4Tensor


def pack(weight: Tensor, scale_block: int) -> Parts:
    """A dense weight of any shape as parts."""
    made = nf4_tensor().from_tensor(weight.reshape(-1, BLOCK).contiguous(), BLOCK, scale_block)
    return Parts(made.quantized_data, made.quantized_scalers, made.quantization_factor, made.scaler_mean, made.nf4)


def unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    """The numbers in a row, `[n]`."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

    blocks = parts.scales.numel()
    shape, scale_block = torch.Size((blocks, BLOCK)), blocks // parts.factors.numel()
    meta = SubclassTensorArgs(shape, (BLOCK, 1), 0, parts.levels.dtype, parts.codes.device, False)
    inner = (parts.scales, parts.factors, parts.mean, parts.codes, parts.levels)
    return nf4_tensor()(meta, BLOCK, blocks, scale_block, *inner).get_original_weight().reshape(-1).to(dtype)


# --- float8 training: the names that `torchao.float8` does not list ---------------------------------------------------


def fp8_dtype(layer: Any) -> torch.dtype:
    """What a converted layer's weight is cast to (AMD has a type of its own)."""
    dtype: torch.dtype = layer.config.cast_config_weight.target_dtype
    return dtype


def fp8_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What values are multiplied with before they are cast: fp32, of the largest absolute values."""
    from torchao.float8.float8_utils import amax_to_scale

    return amax_to_scale(largest, dtype)


def fp8_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype, layer: Any) -> Tensor:
    """Codes `[out, in]` as a weight that the converted `layer` multiplies with as it is; it looks like `dtype`."""
    from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole

    return Float8TrainingTensor(codes, scale, dtype, layer.linear_mm_config, GemmInputRole.WEIGHT)


def weight_in_fp8(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes `[out, in]` and scale (0-dim) of what `fp8_weight` made; None: it is something else."""
    from torchao.float8.float8_training_tensor import Float8TrainingTensor

    return (weight._data, weight._scale) if isinstance(weight, Float8TrainingTensor) else None


def set_fp8_scale(weight: Any, scale: Tensor) -> None:
    """Of what `fp8_weight` made."""
    weight._scale = scale
