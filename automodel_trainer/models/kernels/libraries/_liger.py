"""Liger Kernel (0.8.5; arXiv 2410.10989): Triton kernels for norms, gated MLPs, rotary embedding and the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_trainer.models.kernels.library import KernelLibrary, LossFunction, Offer
from automodel_trainer.models.kernels.mlp import GatedMLP, GateKernel
from automodel_trainer.models.kernels.norm import Norm, NormKernel
from automodel_trainer.models.kernels.rope import RopeKernel
from automodel_trainer.nn.constants import IGNORE_INDEX

_TRITON = "Triton compiles the kernel when it first runs"


class Liger(KernelLibrary):
    """Its autograd functions. The compiler looks into them, so a compiled block stays one graph."""

    name = "liger"
    title = "Liger"
    requirement = "Liger Kernel and Triton: pip install 'automodel-trainer[liger]'"
    offers = {
        "loss": Offer(cost=f"{_TRITON}; waits for the device once per micro-batch"),
        "norm": Offer(cost=_TRITON),
        "activation": Offer(cost=_TRITON),
        "rope": Offer(cost=f"{_TRITON}; for all models of the same transformers module"),
    }

    def load(self) -> Any:
        """The module with the autograd functions."""
        from liger_kernel import ops

        return ops

    def norm(self, norm: Norm) -> NormKernel | str:
        if norm.centred and norm.offset:
            return "LayerNorm with an offset on its weight"
        ops = self.load()
        rms, layer = ops.LigerRMSNormFunction, ops.LigerLayerNormFunction
        rounding = "gemma" if norm.wide else "llama"  # Liger's names for when the result is cast back

        def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y: Tensor = layer.apply(x, weight, torch.zeros_like(weight) if bias is None else bias, norm.eps)
            return y

        def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            # The last argument would let backward overwrite the gradient of the output, which others may still need.
            y: Tensor = rms.apply(x, weight, norm.eps, norm.offset, rounding, False)
            return y if bias is None else y + bias

        return layer_norm if norm.centred else rms_norm

    def activation(self, mlp: GatedMLP) -> GateKernel | str:
        ops = self.load()
        function = {"silu": ops.LigerSiLUMulFunction, "gelu_tanh": ops.LigerGELUMulFunction}.get(mlp.activation)
        if function is None:
            return f"its activation is {mlp.activation}"

        def gated(gate: Tensor, up: Tensor) -> Tensor:  # the compiler looks into Python functions only
            product: Tensor = function.apply(gate, up)
            return product

        return gated

    def rope(self) -> RopeKernel:
        function = self.load().LigerRopeFunction

        def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            both: tuple[Tensor, Tensor] = function.apply(q, k, cos, sin)
            return both

        return rotated

    def loss(self) -> LossFunction:
        return self._linear_cross_entropy

    def _linear_cross_entropy(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """See `LossKernel`; gradients of the weight are summed in fp32."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
        loss, *_ = self.load().LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, bias, None, IGNORE_INDEX, 0.0, 0.0, "sum", None, False, torch.float32
        )  # fmt: skip
        return loss  # type: ignore[no-any-return]


LIGER = Liger()
LIBRARIES = (LIGER,)
