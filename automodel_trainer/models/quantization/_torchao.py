"""NF4 by torchao, and its fp8 training (torchao 0.18). Every private name of torchao is in this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_trainer.models.quantization.nf4 import BLOCK, QuantizedParts
from automodel_trainer.nn.operators import operator


def nf4_tensor() -> Any:
    """torchao's NF4Tensor.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.quantization import NF4Tensor
    except ImportError as error:
        raise ValueError("lora quantize='nf4' needs torchao: pip install 'automodel-trainer[fp8]'.") from error
    return NF4Tensor


def quantize(weight: Tensor, scale_block: int) -> QuantizedParts:
    """A dense weight of any shape as parts."""
    made = nf4_tensor().from_tensor(weight.reshape(-1, BLOCK).contiguous(), BLOCK, scale_block)
    return QuantizedParts(
        made.quantized_data, made.quantized_scalers, made.quantization_factor, made.scaler_mean, made.nf4
    )


def dequantize(parts: QuantizedParts, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """The elements in row-major order, `[n]`; see `nf4.deferred` for `after`."""
    corner = None if after is None else after[(slice(1),) * after.ndim]
    return dequantize_nf4(parts.codes, parts.scales, parts.factors, parts.mean, parts.levels, corner).to(dtype)


@operator("dequantize_nf4")
def dequantize_nf4(
    codes: Tensor, scales: Tensor, factors: Tensor, mean: Tensor, levels: Tensor, after: Tensor | None
) -> Tensor:
    """The elements `[n]` of `QuantizedParts`, in the dtype of `levels`.

    This is a custom operation because the compiler divides two numbers for every element, where 64 have the same scale.
    Nothing reads `after`: the compiler does not move the operation before what computes it.
    """
    if codes.is_cuda:
        from automodel_trainer.models.quantization.nf4_triton import dequantize_in_one_pass

        return dequantize_in_one_pass(codes, scales, factors, mean, levels)
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

    blocks = scales.numel()
    shape, scale_block = torch.Size((blocks, BLOCK)), blocks // factors.numel()
    meta = SubclassTensorArgs(shape, (BLOCK, 1), 0, levels.dtype, codes.device, False)
    made = nf4_tensor()(meta, BLOCK, blocks, scale_block, scales, factors, mean, codes, levels)
    dense: Tensor = made.get_original_weight().reshape(-1)
    return dense


@dequantize_nf4.register_fake
def _(codes: Tensor, scales: Tensor, factors: Tensor, mean: Tensor, levels: Tensor, after: Tensor | None) -> Tensor:
    return levels.new_empty(2 * codes.numel())


# --- float8 training: names that `torchao.float8` does not export -----------------------------------------------------


def fp8_dtype(layer: Any) -> torch.dtype:
    """The dtype that a converted layer's weight is cast to (AMD GPUs have their own)."""
    dtype: torch.dtype = layer.config.cast_config_weight.target_dtype
    return dtype


def fp8_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor that values are multiplied with before the cast: fp32, in the shape of `largest`.

    Args:
        largest: the largest absolute values.
        dtype: that the values are cast to.
    """
    from torchao.float8.float8_utils import amax_to_scale

    return amax_to_scale(largest, dtype)


def fp8_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype, layer: Any) -> Tensor:
    """Codes `[out, in]` as a weight that the converted `layer` does not cast again. It looks like `dtype`."""
    from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole

    return Float8TrainingTensor(codes, scale, dtype, layer.linear_mm_config, GemmInputRole.WEIGHT)


def weight_in_fp8(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes `[out, in]` and scale (0-dim) of a weight that `fp8_weight` made; None for any other weight."""
    from torchao.float8.float8_training_tensor import Float8TrainingTensor

    return (weight._data, weight._scale) if isinstance(weight, Float8TrainingTensor) else None


def set_fp8_scale(weight: Any, scale: Tensor) -> None:
    """Change the scale (0-dim) of a weight that `fp8_weight` made."""
    weight._scale = scale
