"""Cross-entropy of a linear head that never holds all logits: it computes them one chunk of tokens at a time.

The forward computes the gradient together with the loss, so backward needs no logits either. The idea comes from Cut
Cross-Entropy (arXiv 2411.09009) and Liger Kernel (arXiv 2410.10989).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from automodel_trainer.nn._torch import FAST_MATH
from automodel_trainer.nn.constants import IGNORE_INDEX


class Groups(NamedTuple):
    """Where the losses of tokens are added up, besides their sum.

    Attributes:
        of: the group of each token, int64 `[n]`.
        sums: fp64 `[groups]`; losses are added in place, on the device.
    """

    of: Tensor
    sums: Tensor

    def add(self, losses: Tensor, start: int = 0) -> None:
        """Add the losses `[m]` of the tokens from `start` on."""
        part = self.of[start : start + len(losses)]
        self.sums.index_add_(0, part, losses.detach().to(self.sums.dtype))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, groups: Groups | None = None
) -> Tensor:
    """The cross-entropy of the logits `hidden · weightᵀ + bias`, summed over the targets that are not −100.

    Args:
        hidden: `[n, h]`.
        weight: `[v, h]`.
        bias: `[v]`, or None.
        targets: int64 `[n]`.
        groups: where the loss of each token is also added up.

    Returns:
        0-dim, fp32 or wider. It can be differentiated once, with respect to hidden, weight and bias.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    if kind == "cpu":  # drop tokens without a label; on a GPU `nonzero` would wait for the device
        rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
        hidden, targets = hidden[rows], targets[rows]
        groups = None if groups is None else Groups(groups.of[rows], groups.sums)
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, groups)
    return total


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk, so that its logits take 1 GiB in bf16 on an accelerator or 256 MiB in fp32 on a CPU.

    It is a multiple of 256 and at least 256.
    """
    elements = 2**26 if device.type == "cpu" else 2**29
    return max(256, elements // vocabulary // 256 * 256)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, groups: Groups | None
    ) -> Tensor:
        by_hidden, by_weight, by_bias, *_ = ctx.needs_input_grad
        loss_and_gradient = _loss_and_gradient if hidden.device.type == "cpu" else _compiled()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if by_hidden else None
        of_weight = torch.zeros_like(weight) if by_weight else None
        of_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if by_bias else None
        rows = chunk_rows(weight.shape[0], hidden.device)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            losses, gradient = loss_and_gradient(F.linear(part, weight, bias), targets[start : start + rows])
            total += losses.sum()
            if groups is not None:
                groups.add(losses, start)
            if of_hidden is not None:
                torch.mm(gradient, weight, out=of_hidden[start : start + rows])
            if of_weight is not None:
                of_weight.addmm_(gradient.T, part)
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=wide)
        ctx.save_for_backward(of_hidden, of_weight, None if of_bias is None else of_bias.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = ctx.saved_tensors
        return (*(g if g is None else g * grad.to(g.dtype) for g in gradients), None, None)


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """From logits `[n, v]`: the losses `[n]` in fp32 or wider, and their gradients `[n, v]` in the logits' dtype."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Not `logsumexp`: the compiler turns this form into one pass over the logits ("online softmax", arXiv 1805.02867).
    largest = wide.amax(-1, keepdim=True)
    log_sum = largest + (wide - largest).exp().sum(-1, keepdim=True).log()
    trained = (targets != IGNORE_INDEX)[:, None]
    index = targets.clamp(min=0)[:, None]
    losses = log_sum - wide.gather(1, index)
    gradient = torch.where(trained, (wide - log_sum).exp(), 0).to(logits.dtype)
    # The gradient at the target is p − 1. In bf16 it would round to 0 for p close to 1, so compute it from the loss.
    at_target = torch.where(trained, torch.expm1(-losses), 0).to(logits.dtype)
    return torch.where(trained, losses, 0)[:, 0], gradient.scatter(1, index, at_target)


@cache
def _compiled() -> Any:
    return torch.compile(_loss_and_gradient, dynamic=False, options=FAST_MATH)
