"""What modules and configs say of a mixture's experts: how many there are, and how many a token uses."""

from __future__ import annotations

from torch import Tensor, nn

# Names of configs; each family has one of its own.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOICES = ("num_experts_per_tok", "moe_topk", "top_k_experts")

_SHARED = "shared"  # in the name of a number of experts that every token uses


def numbers_of_experts(module: nn.Module) -> dict[str, int]:
    """The numbers of experts that a module has as attributes, by name: `num_experts`, `n_shared_experts`, …"""
    return {name: n for name, n in vars(module).items() if name.endswith("experts") and type(n) is int}


def stacks_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a module's own parameter is a stack of matrices, one for each expert."""
    return parameter.ndim == 3 and parameter.shape[0] in numbers_of_experts(module).values()


def share_of_tokens(module: nn.Module, parameter: Tensor, experts: int, chosen: int) -> float:
    """How many tokens use a number of a module's own parameter, on average over its numbers; 1 if it stacks no experts.

    Some routers may choose no expert at all, by numbers that follow the experts'. Stacks may have room for these too.

    Args:
        experts: of a layer, as the config says.
        chosen: by each token.
    """
    if parameter.ndim != 3:
        return 1.0
    numbers, stacked = numbers_of_experts(module), parameter.shape[0]
    chosen_from = {n for name, n in numbers.items() if _SHARED not in name}
    choices = max(experts, *chosen_from, 0)
    if stacked not in (experts, choices) or stacked in set(numbers.values()) - chosen_from:
        return 1.0
    return chosen / choices * min(experts, stacked) / stacked
