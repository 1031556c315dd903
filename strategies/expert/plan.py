"""Which modules of a model are experts, by the plan that the model declares (`model.ep_plan`). No family is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from automodel_trainer.models.quantization.quantize import is_quantized
from automodel_trainer.strategies.tensor.plan import layer_pattern

_DISPATCHED = "ep_dispatch_experts"  # the module receives tokens of all ranks
_STACKED = "grouped_gemm"  # the parameter stacks one matrix or vector per expert along its first dimension
_SHARED = "replicated_with_grad_allreduce"  # all experts use it, as `expert_parallel` takes what is not stacked


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Args:
        name: of the module in its model.
        module: holds all experts; its forward takes `(hidden [n, h], top_k_index [n, k], top_k_weights [n, k])`.
        stacked: names of the module's own parameters that are `[experts, …]`.
    """

    name: str
    module: nn.Module
    stacked: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of experts."""
        return int(self.module._parameters[self.stacked[0]].shape[0])  # type: ignore[union-attr]


def find_experts(model: nn.Module) -> list[Experts]:
    """The experts of `model`, in its order. Empty if the model declares no plan, or its plan matches nothing here.

    A pipeline stage may hold no layer with experts, so an empty list is no error; `require_experts` makes it one. Rules
    for layers beside the experts do not count: they mean ranks that have the same tokens, which those of `ep` have not.

    Raises:
        ValueError: the plan has a rule that this package does not know, or experts without a stacked parameter.
    """
    rules = dict(getattr(model, "ep_plan", None) or {})
    known = (_DISPATCHED, _STACKED, _SHARED)
    dispatched = tuple(name for name, style in rules.items() if style == _DISPATCHED)
    if unknown := {n: style for n, style in rules.items() if style not in known and n.startswith(dispatched)}:
        raise ValueError(
            f"The expert-parallel plan of {type(model).__name__} has unsupported styles: {unknown}. Set ep=1."
        )
    found = []
    for name, module in model.named_modules():
        if rules.get(layer_pattern(name)) != _DISPATCHED:
            continue
        own = [key for key, _ in module.named_parameters(recurse=False)]
        stacked = tuple(key for key in own if rules.get(f"{layer_pattern(name)}.{key}") == _STACKED)
        if not stacked:
            raise ValueError(
                f"The expert-parallel plan of {type(model).__name__} dispatches tokens to {name} and stacks none of "
                f"its parameters ({', '.join(own) or 'it has none'}). Set ep=1."
            )
        found.append(Experts(name, module, stacked))
    return found


def require_experts(model: nn.Module) -> list[Experts]:
    """`find_experts`, for a whole model that is to run with ep > 1.

    Raises:
        ValueError: there are none, a rule of the plan matches nothing, or experts are quantized already.
    """
    found = find_experts(model)
    if not found:
        declared = "declares none" if not getattr(model, "ep_plan", None) else "has one that matches no module"
        raise ValueError(
            f"ep > 1 splits a mixture's experts by the plan that the model declares (model.ep_plan), and "
            f"{type(model).__name__} {declared}. Set ep=1."
        )
    if idle := _idle_rules(model):
        raise ValueError(
            f"The expert-parallel plan of {type(model).__name__} has rules that match nothing, so a part of the "
            f"experts would not be split: {', '.join(idle)}. The first experts hold "
            f"{', '.join(_parameters(found[0]))}. Correct model.ep_plan, or set ep=1."
        )
    for experts in found:
        if any(is_quantized(experts.module.get_parameter(key)) for key in experts.stacked):
            raise ValueError(
                f"The experts {experts.name} are quantized already, and expert parallel splits weights before they "
                "are. Give the folder of the model and lora (or kernels) as options, or set ep=1."
            )
    return found


def _idle_rules(model: nn.Module) -> list[str]:
    """The rules of the model's plan that match no module and no parameter."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    found = {layer_pattern(name) for name in names}
    return [name for name in getattr(model, "ep_plan", None) or {} if name not in found]


def _parameters(experts: Experts) -> list[str]:
    return [f"{experts.name}.{key}" for key, _ in experts.module.named_parameters(recurse=False)]


def choose_ep(experts: int, ranks: int) -> int:
    """The largest number of ranks that divides both `experts` and the `ranks` of a node."""
    return max(size for size in range(1, ranks + 1) if experts % size == 0 and ranks % size == 0)


def check_ep(ep: Any, experts: int | None, ranks: int) -> None:
    """Check that `ep` ranks can hold equal shares of the experts.

    Args:
        ep: as the user gave it.
        experts: the number of experts; None: not known yet.
        ranks: dp_shard × cp × tp of the run.

    Raises:
        ValueError: `ep` is no size, or it does not divide the ranks or the experts.
    """
    if not isinstance(ep, int) or ep < 1:
        raise ValueError(f"ep={ep!r} is not a size: give a positive number of ranks, or 'auto'.")
    if ranks % ep == 0 and (experts is None or experts % ep == 0):
        return
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0 and (experts is None or experts % n == 0)]
    holding = "" if experts is None else f" and the {experts} experts"
    raise ValueError(
        f"ep={ep} must divide dp_shard × cp × tp = {ranks} (expert parallel borrows its ranks from them){holding}. "
        f"Allowed: ep in {sizes}."
    )
