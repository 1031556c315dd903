"""Read a model's own tensor-parallel plan, and check that it fits the model and the number of ranks.

A plan (`model.tp_plan`) maps names of modules or parameters, with `*` for layer numbers, to transformers' styles. Here
it becomes a style per module and a placement per parameter. No model family is named.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from automodel_trainer.distributed._dtensor import StridedShard
from automodel_trainer.nn.towers import towers_of

COLUMNS = {"colwise", "colwise_gather_output", "colwise_rep"}  # cut along the outputs
GATHERED = COLUMNS - {"colwise"}  # their output is gathered
ROWS = {"rowwise", "rowwise_split_input", "rowwise_rep"}  # cut along the inputs
SPLIT_INPUT = ROWS - {"rowwise"}  # their input is whole
PACKED = {"packed_colwise", "packed_rowwise"}  # two matrices fused into one (gate and up): each half is cut
BETWEEN = "replicated_with_grad_allreduce"  # replicated, but between cut layers: gradients are partial
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
STYLES = {
    *COLUMNS, *ROWS, *PACKED, BETWEEN, "embedding_rowwise", "embedding_colwise", "mla_kv_a_proj", "all_reduce",
    "moe_tp_experts", "moe_identity_expert", "local_params", "sequence_parallel", "replicate",
}  # fmt: skip


@dataclass
class TensorPlan:
    """A plan expanded over one model.

    Args:
        modules: the style of every module that has a rule, by module name.
        placements: how each cut parameter is sharded, by the parameter's id, so that tied parameters count as one.
        summed: ids of replicated parameters whose gradients are partial: every rank computes a part.
        head: the name of the output head, if its logits are sharded over the vocabulary.
    """

    modules: dict[str, str] = field(default_factory=dict)
    placements: dict[int, Placement] = field(default_factory=dict)
    summed: set[int] = field(default_factory=set)
    head: str | None = None


def expand_plan(model: nn.Module, size: int, overrides: Mapping[str, str] | None = None) -> TensorPlan:
    """Expand the model's plan, changed by `overrides`, over its modules and parameters.

    Towers stay whole, also where the model has rules for them, unless `overrides` names them.

    Args:
        model: on meta or real.
        size: number of tp ranks.
        overrides: rules with the same keys and styles as the model's; the style `replicate` removes a rule.

    Raises:
        ValueError: there is no plan, a style is unknown, an override matches nothing, a tied weight is cut in two ways,
            or `size` does not divide heads and widths.
    """
    given = _rules(model, overrides or {})
    towers = {id(module) for tower in towers_of(model) for module in tower.modules()}
    plan = TensorPlan()
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            continue  # experts that expert parallel has split
        rules = overrides or {} if id(module) in towers else given
        style = _rule_for(rules, name)
        if style is not None:
            plan.modules[name] = style
        for key, parameter in module.named_parameters(recurse=False):
            own = _rule_for(rules, f"{name}.{key}".lstrip(".")) or style
            if own is not None:
                _place(plan, f"{name}.{key}", module, parameter, own)
    if not plan.placements:
        raise ValueError(_no_plan(model, "has one that matches none of its parameters"))
    _join_tied_embedding(model, plan, names)
    _sum_inside(model, plan)
    _check(model, plan, size)
    return plan


def _rules(model: nn.Module, overrides: Mapping[str, str]) -> dict[str, str]:
    """The model's rules with `overrides`, all of them known styles."""
    own = dict(getattr(model, "tp_plan", None) or {})
    if not own and not overrides:
        raise ValueError(_no_plan(model, "declares none"))
    present = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters(remove_duplicate=False)}
    present |= {layer_pattern(name) for name in present}
    for name, style in overrides.items():
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"tp_plan: {name!r} matches nothing in {type(model).__name__}.{hint} Give the name of a module or "
                "parameter, with * for layer numbers."
            )
        if style not in STYLES:
            raise ValueError(
                f"tp_plan: {name!r} has the unknown style {style!r}. Allowed: {', '.join(sorted(STYLES))}."
            )
    rules = {**own, **overrides}
    # The model's own rules may match nothing: plans of a family also name modules that only some models have.
    if unknown := {name: style for name, style in rules.items() if style not in STYLES and name in present}:
        raise ValueError(
            f"The tensor-parallel plan of {type(model).__name__} has unsupported styles: {unknown}. Override these "
            f"rules with tp_plan={{name: style}}, where style is one of {', '.join(sorted(STYLES))}; or set tp=1."
        )
    return rules


def _no_plan(model: nn.Module, what: str) -> str:
    """The message for a model without a usable plan; `what` completes "The model …"."""
    return (
        f"tp > 1 needs a tensor-parallel plan that cuts something, and {type(model).__name__} {what}. Set "
        "tp_plan={'model.layers.*.mlp.up_proj': 'colwise', 'model.layers.*.mlp.down_proj': 'rowwise', …}, or set tp=1 "
        "and shard with fsdp2 instead."
    )


def _rule_for(rules: Mapping[str, str], name: str) -> str | None:
    """The style for a name. A rule for one layer (`layers.3.mlp`) wins over one for all layers (`layers.*.mlp`)."""
    return rules.get(name) or rules.get(layer_pattern(name))


def layer_pattern(name: str) -> str:
    """`name` with `*` for every layer number, as plans write it."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _place(plan: TensorPlan, name: str, module: nn.Module, parameter: nn.Parameter, style: str) -> None:
    """Add one parameter of `module` to the plan, by its style."""
    placement = _placement(parameter, style)
    before = plan.placements.get(id(parameter), placement)
    if before != placement:
        raise ValueError(
            f"The tensor-parallel plan cuts {name}, a tied weight, in two ways ({before} and {placement}). Override "
            "one of its rules with tp_plan={name: style}."
        )
    if style in COLUMNS | ROWS and _is_holder(module, parameter) and not isinstance(module, nn.Linear):
        raise ValueError(
            f"The tensor-parallel plan has style {style!r} for {name.rpartition('.')[0]}, which is no linear layer but "
            f"{type(module).__name__}. Override the rule with tp_plan={{name: 'replicate'}}."
        )
    if placement is not None:
        plan.placements[id(parameter)] = placement
    if style == BETWEEN:
        plan.summed.add(id(parameter))


def _is_holder(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether `parameter` is a layer's weight or bias, and not a parameter with its own rule (experts, sinks)."""
    return module._parameters.get("weight") is parameter or module._parameters.get("bias") is parameter


def _placement(parameter: nn.Parameter, style: str) -> Placement | None:
    """How a style shards a parameter; None if it does not (a row-cut layer's bias, a replica)."""
    columns = max(parameter.ndim - 2, 0)  # the output dimension of [out], [out, in] or [experts, out, in]
    if style in COLUMNS:
        return Shard(columns)
    if style in ROWS:
        return Shard(parameter.ndim - 1) if parameter.ndim > 1 else None
    if style == "packed_colwise":
        return StridedShard(columns, split_factor=2)
    if style == "packed_rowwise":
        return StridedShard(parameter.ndim - 1, split_factor=2) if parameter.ndim > 1 else None
    if style in ("embedding_rowwise", "embedding_colwise"):
        return Shard(int(style == "embedding_colwise"))
    return None


def _join_tied_embedding(model: nn.Module, plan: TensorPlan, names: dict[int, str]) -> None:
    """Give a head and an embedding that share their weight the same cut, whichever of them the plan names."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        name = names[id(module)]
        cut = plan.placements.get(id(getattr(module, "weight", None)))
        if cut is None or plan.modules.get(name, "replicate") != "replicate":
            continue
        if isinstance(module, nn.Embedding):
            plan.modules[name] = "embedding_rowwise" if cut == Shard(0) else "embedding_colwise"
        elif isinstance(module, nn.Linear):
            plan.modules[name] = "colwise_gather_output" if cut == Shard(0) else "rowwise_split_input"
    if head is not None and plan.modules.get(names.get(id(head), "")) in COLUMNS:
        plan.head = names[id(head)]


def _sum_inside(model: nn.Module, plan: TensorPlan) -> None:
    """Mark parameters inside cut modules that plans do not mention: those of activation functions and of embeddings.

    Their gradients are partial. An activation function after a column-cut layer sees only this rank's columns; a norm
    inside an embedding that is cut over the vocabulary sees only this rank's tokens.
    """
    for name, module in model.named_modules():
        if plan.modules.get(name) == "embedding_rowwise":
            plan.summed |= {id(p) for p in module.parameters() if id(p) not in plan.placements}
        parent = name.rpartition(".")[0]
        cut = any(style == "colwise" and child.rpartition(".")[0] == parent for child, style in plan.modules.items())
        if cut and type(module).__module__ in ACTIVATIONS and next(module.parameters(), None) is not None:
            plan.modules[name] = BETWEEN
            plan.summed |= {id(parameter) for parameter in module.parameters()}


def _check(model: nn.Module, plan: TensorPlan, size: int) -> None:
    """Check that every rank gets whole heads and an equal share of every width. Only vocabularies may be uneven."""
    heads = heads_of(getattr(model, "config", None))
    attention = heads.get("num_attention_heads", 0)
    for name, module in model.named_modules():
        if name == plan.head or isinstance(module, nn.Embedding):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        cuts_heads = plan.modules.get(name) == "colwise" and hasattr(parent, "is_causal")  # attention layers have it
        head_dim = getattr(parent, "head_dim", 1) if cuts_heads else 1
        for key, parameter in module.named_parameters(recurse=False):
            cut = plan.placements.get(id(parameter))
            if cut is None and plan.modules.get(name) == "moe_tp_experts":
                raise ValueError(
                    f"The tensor-parallel plan of {type(model).__name__} cuts the experts {name} but not their {key}, "
                    f"which every rank would add to the sum. Set tp_plan={{'{layer_pattern(name)}.{key}': 'colwise' or "
                    f"'rowwise'}}, or replicate the experts with tp_plan={{'{layer_pattern(name)}': 'replicate', …}}."
                )
            if cut is None:
                continue
            width = parameter.shape[cut.dim] // getattr(cut, "split_factor", 1)  # type: ignore[attr-defined]
            units = [width // head_dim, *([attention] if cuts_heads and attention else [])]
            if any(unit % size for unit in units):
                stated = ", ".join(f"{n}={count}" for n, count in heads.items())
                raise ValueError(
                    f"tp={size} does not fit {type(model).__name__}: {name}.{key} {list(parameter.shape)} can only be "
                    f"cut into whole {f'heads ({stated})' if cuts_heads else 'columns'}. Allowed: tp in "
                    f"{tp_sizes(units)}; or replicate its layer with tp_plan={{name: 'replicate'}}."
                )


def heads_of(config: object) -> dict[str, int]:
    """The numbers of attention heads and key/value heads that a config states (of a composite one: its text part)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    return {name: heads for name, heads in found.items() if isinstance(heads, int)}


def tp_sizes(widths: list[int]) -> list[int]:
    """The numbers of ranks that divide all of `widths`, ascending."""
    common = math.gcd(*widths)
    return [n for n in range(1, common + 1) if common % n == 0]
