"""Every use of Liger Kernel (0.8.5; arXiv 2410.10989): Triton kernels for norms, gated MLPs, rotation and the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_trainer.models.kernels.mlp import GatedMLP, GateKernel
from automodel_trainer.models.kernels.norm import Norm, NormKernel
from automodel_trainer.models.kernels.rope import RopeKernel


def liger(option: str) -> Any:
    """The module with Liger's autograd functions.

    Raises:
        ValueError: it is not installed; `option` is who asked.
    """
    try:
        from liger_kernel import ops
    except ImportError as error:
        raise ValueError(
            f"{option} needs Liger Kernel and Triton: pip install 'automodel-trainer[liger]' ({error})."
        ) from error
    return ops


def norm_kernel(norm: Norm) -> NormKernel | str:
    """A kernel for such norms, or why there is none."""
    ops = liger("norm='liger'")
    if norm.centred and norm.offset:
        return "LayerNorm with an offset on its weight"
    rms, layer = ops.LigerRMSNormFunction, ops.LigerLayerNormFunction
    rounding = "gemma" if norm.wide else "llama"  # Liger's names for when the result is cast back

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = layer.apply(x, weight, torch.zeros_like(weight) if bias is None else bias, norm.eps)
        return y

    def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not in place: who else needs the gradient of the output is not known here.
        y: Tensor = rms.apply(x, weight, norm.eps, norm.offset, rounding, False)
        return y if bias is None else y + bias

    return layer_norm if norm.centred else rms_norm


def gate_kernel(mlp: GatedMLP) -> GateKernel | str:
    """A kernel of act(gate) · up, or why there is none."""
    ops = liger("activation='liger'")
    function = {"silu": ops.LigerSiLUMulFunction, "gelu_tanh": ops.LigerGELUMulFunction}.get(mlp.activation)
    if function is None:
        return f"its activation is {mlp.activation}"

    def gated(gate: Tensor, up: Tensor) -> Tensor:  # a function of Python's: the compiler looks into no other
        product: Tensor = function.apply(gate, up)
        return product

    return gated


def rope_kernel() -> RopeKernel:
    """A kernel of q `[b, h, s, d]`, k `[b, h_kv, s, d]`, cos and sin `[b, s, d]`."""
    function = liger("rope='liger'").LigerRopeFunction

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = function.apply(q, k, cos, sin)
        return both

    return rotated


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """As `modules.linear_cross_entropy` has it: summed over targets that are not −100; weight gradients in fp32."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    function = liger("loss='liger'").LigerFusedLinearCrossEntropyFunction
    loss, *_ = function.apply(
        hidden, weight, targets, bias, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
    )  # fmt: skip
    return loss  # type: ignore[no-any-return]
