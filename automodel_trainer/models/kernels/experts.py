"""The experts of a mixture in grouped matmuls, with few passes over the tokens.

Every token is copied once per chosen expert, and the copies are sorted by expert. Two grouped matmuls then compute all
experts. The routing weight is multiplied in between, where the rows are narrow, because the second matmul is linear.
Copying tokens and adding up their results are each other's gradient, so both directions only gather: nothing is
scattered with atomic additions, and results do not change from run to run.

Adapters (LoRA) stay factors: the updates of the experts' weights are never built.

Source: MegaBlocks, arXiv 2211.15841 (dropless experts by grouped matmuls).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from automodel_trainer.models._experts import ExpertsLayout, experts_layout, grouped_mm, holds_part_of_experts
from automodel_trainer.models.kernels.experts_fp8 import cast_to_fp8, held_in_fp8
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.layers import LoRAParameters
from automodel_trainer.models.quantization.fp8_weight import MULTIPLE
from automodel_trainer.models.quantization.fp8_weight import SCHEMES as FP8_SCHEMES
from automodel_trainer.models.quantization.quantize import is_to_be_quantized, quantize_parameters
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor
from automodel_trainer.nn.mixing import mixed
from automodel_trainer.nn.operators import operator

_ALIGNED = 8  # a grouped matmul takes rows of 16 bytes and their multiples


class GroupedExperts(nn.Module):
    """Experts that compute in grouped matmuls. Mixed in by `swap_experts`; parameters stay what they are."""

    layout: ExpertsLayout
    in_fp8 = False  # trained weights, and inputs, are cast in every forward

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, choices: int | None = None
    ) -> Tensor:
        """Compute the weighted sum of each token's experts.

        Args:
            hidden_states: `[n, h]`.
            top_k_index: int64 `[n, k]`. The number that follows the last expert means an expert held elsewhere.
            top_k_weights: `[n, k]`.
            choices: how many of `top_k_index` are experts held here, where that is known on the host. The others then
                take no memory.

        Returns:
            `[n, h]`.
        """
        layout, experts = self.layout, self._parameters[self.layout.down].shape[0]  # type: ignore[union-attr]
        routes = Routes(top_k_index, experts, partly=holds_part_of_experts(self), choices=choices)
        rows = _Copies.apply(hidden_states, routes.token, routes.row, routes.valid)
        inner = layout.activation(self._project(layout.up, rows, routes))
        weights = routes.of_rows(top_k_weights).to(inner.dtype)[:, None]
        output = self._project(layout.down, routes.masked(inner * weights), routes, weights)
        return _Sums.apply(output, routes.token, routes.row, routes.valid)

    def _project(self, name: str, x: Tensor, routes: Routes, scale: Tensor | None = None) -> Tensor:
        """x `[s, in]` through each row's expert: `[s, out]`. `scale` `[s, 1]` is what x has been multiplied with."""
        transposed, weight = self.layout.transposed, self._parameters[name]
        assert weight is not None
        if isinstance(weight, QuantizedTensor) and weight.scheme in FP8_SCHEMES:
            y = held_in_fp8(x, weight, routes.ends, routes.expert, transposed)
        elif isinstance(weight, QuantizedTensor):
            y = _Frozen.apply(x, weight, routes.ends, transposed)
        elif self.in_fp8:
            y = cast_to_fp8(x, weight, routes.ends, transposed)
        else:
            y = grouped_mm(x, weight if transposed else weight.mT, routes.ends)
        if isinstance(self, LoRAParameters) and name in self.adapted:
            y = y + _low_rank(self, name, x, routes.ends)
        if scale is None:  # not a number times no gradient would be not a number
            y = routes.masked(y)
        if self.layout.biased:
            bias = self._parameters[f"{name}_bias"]
            assert bias is not None
            rows = bias[routes.expert]
            y = y + (rows if scale is None else rows * scale)
        return y


class Routes:
    """Where each copy of a token is, once copies are sorted by expert: s rows, with n tokens and k choices n · k.

    Args:
        index: int64 `[n, k]`, the chosen experts.
        experts: how many there are.
        partly: whether a choice may be none of them, and have their number. Such copies come last and count as zeros.
        choices: how many choices are one of them. Then there are only as many rows, and no such copies.

    Attributes:
        order: `[s]`, the choice `token · k + slot` of each row.
        token: `[s]`, the token of each row.
        row: `[n, k]`, the row of each choice; any row for one that has none.
        ends: int32 `[experts]`, the end of each expert's rows.
        expert: `[s]`, the expert of each row.
        valid: bool `[n, k]`, choices of one of the experts; None: all of them.
    """

    def __init__(self, index: Tensor, experts: int, partly: bool, choices: int | None = None) -> None:
        chosen, order = index.reshape(-1).sort(stable=True)
        numbers = torch.arange(len(chosen), device=index.device)
        row = torch.empty_like(order).scatter_(0, order, numbers)
        if choices is not None:
            chosen, order, row = chosen[:choices], order[:choices], row.clamp(max=choices - 1)
        self.order, self.row = order, row.view(index.shape)
        self.token = self.order // index.shape[1]
        counted = torch.arange(experts, device=index.device, dtype=chosen.dtype)
        self.ends = torch.searchsorted(chosen, counted, right=True, out_int32=True)
        self.valid = index < experts if partly else None
        left_over = partly and choices is None
        self._row_valid = (chosen < experts)[:, None] if left_over else None
        self.expert = chosen.clamp(max=experts - 1) if left_over else chosen

    def of_rows(self, weights: Tensor) -> Tensor:
        """The routing weights `[n, k]` by row, `[s]`."""
        valid = None if self.valid is None else self.valid.reshape(-1)
        return _Permuted.apply(weights.reshape(-1), self.order, self.row.reshape(-1), valid)

    def masked(self, x: Tensor) -> Tensor:
        """x `[s, …]` with zeros for choices of other experts: a grouped matmul leaves such rows unwritten."""
        return x if self._row_valid is None else torch.where(self._row_valid, x, 0.0)


def swap_experts(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Make the experts of `model` (on meta or real, not laid out yet) compute in grouped matmuls, in place.

    Returns:
        names of the swapped modules; and of those that hold experts and were not swapped, with the reason.
    """
    swapped: list[str] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        layout = experts_layout(module)
        if isinstance(layout, str):
            left[name] = layout
        elif layout is not None and not isinstance(module, GroupedExperts):
            module.__class__ = mixed(GroupedExperts, type(module))  # type: ignore[assignment, arg-type]
            module.layout = layout  # type: ignore[assignment]
            swapped.append(name)
    return swapped, left


def experts_to_fp8(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Make grouped experts multiply in fp8, in place. Frozen weights under adapters are held in fp8 from now on.

    Args:
        model: on meta or real, not laid out yet.
        names: of modules that `swap_experts` changed.

    Returns:
        the modules that stay as they are, with the reason.
    """
    left: dict[str, str] = {}
    adapted = lora_of(model) is not None
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, GroupedExperts)
        keys = (module.layout.up, module.layout.down)
        sides = [module._parameters[key].shape[1:] for key in keys]  # type: ignore[union-attr]
        if any(side % MULTIPLE for shape in sides for side in shape):
            left[name] = " and ".join(" × ".join(map(str, shape)) for shape in sides)
        elif any(is_to_be_quantized(module, key) for key in keys):
            left[name] = "held in 4 bits"
        elif adapted and not any(module._parameters[key].requires_grad for key in keys):  # type: ignore[union-attr]
            quantize_parameters(model, {name: keys}, "fp8-rowwise")
        else:
            module.in_fp8 = True
    return left


def _low_rank(module: LoRAParameters, name: str, x: Tensor, ends: Tensor) -> Tensor:
    """The update of each row's expert, `[s, out]`: scaling · x·Aᵀ·Bᵀ, in the dtype of x."""
    factors, weight = module.low_rank_of(name), module._parameters[name]
    assert weight is not None
    experts, inputs = weight.shape[0], x.shape[1]
    a = factors.lora_A.weight.view(experts, -1, inputs)
    b = (factors.lora_B.weight * factors.scaling).to(x.dtype)
    missing = -a.shape[1] % _ALIGNED
    a = nn.functional.pad(a, (0, 0, 0, missing)) if missing else a
    return grouped_mm(grouped_mm(x, a.to(x.dtype).mT, ends), _expert_major(b, experts, missing).mT, ends)


@operator("expert_major")
def _expert_major(b: Tensor, experts: int, missing: int) -> Tensor:
    """PEFT's B `[out, rank · experts]`, the expert running fastest, as `[experts, out, rank + missing]` with zeros.

    It is an operator of its own because a grouped matmul needs a contiguous matrix, which the compiler would not keep.
    """
    split = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return nn.functional.pad(split, (0, missing)).contiguous()


@_expert_major.register_fake
def _(b: Tensor, experts: int, missing: int) -> Tensor:
    return b.new_empty(experts, b.shape[0], b.shape[1] // experts + missing)


def _expert_major_backward(ctx: Any, grad: Tensor) -> Any:
    experts, outputs, _ = grad.shape
    return grad[..., : ctx.rank].permute(1, 2, 0).reshape(outputs, ctx.rank * experts), None, None


def _keep_rank(ctx: Any, inputs: Any, output: Tensor) -> None:
    b, experts, _ = inputs
    ctx.rank = b.shape[1] // experts


_expert_major.register_autograd(_expert_major_backward, setup_context=_keep_rank)


# Each of these makes a new tensor in forward and backward, and casts only where the dtype changes: torch 2.11's
# compiler loses the gradient of a view, and of a cast that does nothing.


class _Copies(Function):
    """Tokens `[n, h]` to rows `[s, h]`. The backward is `_Sums`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(row, valid)
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _sum_of_choices(grad, *ctx.saved_tensors), None, None, None


class _Sums(Function):
    """Rows `[s, h]` to tokens `[n, h]`, adding up. The backward is `_Copies`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, row: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_of_choices(rows, row, valid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (token,) = ctx.saved_tensors
        return grad[token], None, None, None


class _Permuted(Function):
    """x `[n · k]` in another order, `[s]`; the backward puts the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, valid)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inverse, valid = ctx.saved_tensors
        own = grad[inverse]
        return own if valid is None else torch.where(valid, own, 0.0), None, None, None


class _Frozen(Function):
    """A grouped matmul with a frozen weight that is held quantized: backward takes it out of its codes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor, ends: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight, ends)
        ctx.transposed = transposed
        whole = weight.get_original_weight().to(x.dtype)
        return grouped_mm(x, whole if transposed else whole.mT, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, ends = ctx.saved_tensors
        whole = weight.get_weight_in_backward(grad).to(grad.dtype)
        return grouped_mm(grad, whole.mT if ctx.transposed else whole, ends), None, None, None


def _sum_of_choices(rows: Tensor, row: Tensor, valid: Tensor | None) -> Tensor:
    """The sum of the rows `[s, h]` of each token's choices, in fp32 or wider: `[n, h]` in the dtype of the rows."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(row.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    for slot in range(row.shape[1]):
        part = rows[row[:, slot]]
        total = total + (part if valid is None else torch.where(valid[:, slot, None], part, 0.0))
    return total if rows.dtype == wide else total.to(rows.dtype)
