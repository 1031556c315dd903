"""Every private name of transformers' experts (transformers 5.23.0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.integrations import moe


def hold_part_of_experts(module: torch.nn.Module, count: int) -> None:
    """Tell a module of experts that it holds `count` of them, and that tokens may name one more, which it skips."""
    module.num_experts = count  # type: ignore[assignment]
    module._is_expert_parallel = True  # type: ignore[assignment]


def holds_part_of_experts(module: torch.nn.Module) -> bool:
    """Whether `hold_part_of_experts` has changed this module."""
    return bool(getattr(module, "_is_expert_parallel", False))


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module of experts holds its weights, and what it computes between the two projections.

    Args:
        up, down: names of the stacked weights, `[experts, out, in]` or `[experts, in, out]`.
        activation: of the first projection's output `[s, w]`: `[s, inner]`.
        transposed: whether the weights are `[experts, in, out]`.
        biased: whether each has a bias `[experts, out]`, under its name and `_bias`.
    """

    up: str
    down: str
    activation: Callable[[Tensor], Tensor]
    transposed: bool
    biased: bool


def experts_layout(module: torch.nn.Module) -> ExpertsLayout | str | None:
    """How `module` holds experts; a text: why its experts cannot be grouped; None: it holds none."""
    if getattr(module, "_is_expert_parallel", None) is None:
        return None
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises each expert's output"
    gated = bool(getattr(module, "has_gate", True))
    up = "gate_up_proj" if gated else "up_proj"
    if not {up, "down_proj"} <= module._parameters.keys():
        return f"it has no {up} and down_proj"
    activation = module._apply_gate if gated else module.act_fn
    return ExpertsLayout(
        up,
        "down_proj",
        activation,  # type: ignore[arg-type]
        bool(getattr(module, "is_transposed", False)),
        bool(getattr(module, "has_bias", False)),
    )


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x `[s, in]` times their expert's matrix of weight `[experts, in, out]`: `[s, out]`.

    Args:
        ends: int32 `[experts]`, the end of each expert's rows, which are sorted. What follows the last is not written.
    """
    if x.dtype == torch.float64:  # torch's kernel does not have it
        return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=ends)  # type: ignore[no-any-return]
    return moe._grouped_mm(x, weight, ends)


def numbers_for(module: torch.nn.Module, experts: Tensor) -> Tensor:
    """The numbers of chosen experts `[m, k]`, as the experts' code takes them that `hold_part_of_experts` changed.

    A choice of an expert that is held elsewhere has the weight 0 and the number that follows the last. Some families'
    eager code has no room for that number, so there it is the last expert's.
    """
    eager = getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"
    return experts.clamp(max=module.num_experts - 1) if eager else experts  # type: ignore[operator]
