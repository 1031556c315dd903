"""Where a decoder is cut into pipeline stages, and taking away what a rank's stages do not use.

The model stays one Hugging Face model with its own names. What another rank holds is replaced by an empty module, so
that layer numbers, layer kinds (sliding and full attention) and state-dict keys stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.models._transformers import forget_absent_ties, packing_without_sync
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.strategies.tensor.sequence import stacks

_HIDDEN = ["hidden_states"]


@dataclass(frozen=True)
class Parts:
    """A decoder's parts by module name.

    Args:
        layers: the `nn.ModuleList` of its layers.
        before: modules with parameters that run before the first layer (embeddings).
        after: modules with parameters that run after the last layer (final norm, head).
    """

    layers: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: a run of layers; the first has the embeddings too, the last the final norm and the head."""

    index: int
    layers: range
    first: bool
    last: bool


@dataclass
class Split:
    """What a rank holds of a split model.

    Args:
        parts: of the whole model.
        stages: all stages, in order.
        own: those of this rank.
        names: all tensors of the whole model, in its order.
        absent: names of the modules that other ranks hold.
        shared: names of parameters that the first and the last stage use both, where these are on different ranks.
        tables: names of the modules before the layers that look tokens up.
    """

    parts: Parts
    stages: list[Stage]
    own: list[Stage]
    names: list[str]
    absent: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    tables: set[str] = field(default_factory=set)

    @property
    def holds_first(self) -> bool:
        return any(stage.first for stage in self.own)

    @property
    def holds_last(self) -> bool:
        return any(stage.last for stage in self.own)


class Absent(nn.Module):
    """Stands where a module was that another rank holds; keeps the parameters that this rank shares with it."""

    def __init__(self, kept: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in kept.items():
            self.register_parameter(name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a module of another pipeline stage was called")


def find_parts(model: nn.Module) -> Parts:
    """The parts of a decoder: by the model's own `pp_plan`, or, if it declares none, by the order in which they run.

    Raises:
        ValueError: an encoder-decoder, several stacks of layers, or layers that pass on more than hidden states.
    """
    kind = type(model).__name__
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"pp > 1 cuts decoders; {kind} has an encoder as well. Use fsdp2, or tp.")
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"pp > 1: the balancing loss of {kind}'s routers is one number over all layers, which no stage has. Set "
            "output_router_logits=False in the config (config_overrides), or use fsdp2."
        )
    found = list(stacks(model))
    if len(found) != 1:
        raise ValueError(
            f"pp > 1 cuts one stack of layers, and {kind} has {len(found)} ({', '.join(found) or 'none'}). Use fsdp2, "
            "or tp."
        )
    return _planned(model, found[0]) or _traced(model, found[0])


def _planned(model: nn.Module, layers: str) -> Parts | None:
    plan: dict[str, Any] = dict(getattr(model, "pp_plan", None) or {})
    if layers not in plan:
        return None
    if list(plan[layers][1]) != _HIDDEN:
        raise ValueError(
            f"pp > 1 sends hidden states from layer to layer; those of {type(model).__name__} pass on "
            f"{plan[layers][1]} (its pp_plan). Use fsdp2, or tp."
        )
    inner = [name for name in plan if name.rpartition(".")[0] == layers.rpartition(".")[0]]
    outer = [name for name in plan if name not in inner]  # the head: transformers lists it first
    place = inner.index(layers)
    before, after = inner[:place], [*inner[place + 1 :], *outer]
    modules = dict(model.named_modules())
    parts = Parts(layers, _with_parameters(modules, before), _with_parameters(modules, after))
    return parts if not _unplaced(model, parts) else None


def _with_parameters(modules: dict[str, nn.Module], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(n for n in names if n in modules and next(modules[n].parameters(), None) is not None)


def _unplaced(model: nn.Module, parts: Parts) -> list[str]:
    known = tuple(f"{name}." for name in (parts.layers, *parts.before, *parts.after))
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(known)]


@torch.no_grad()
def _traced(model: nn.Module, layers: str) -> Parts:
    """Run the model on four tokens, its layers left out, and see what is called before and after them."""
    # of a model on meta nothing can be asked: no look at documents, or at padding without a mask
    packing_without_sync(model)  # type: ignore[arg-type]
    config: Any = model.config
    padding, config.pad_token_id = getattr(config, "pad_token_id", None), None
    stack = model.get_submodule(layers)
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if not name.startswith(layers) and next(module.parameters(recurse=False), None) is not None
    ]
    own = dict(stack._modules)
    training = model.training
    for key in own:
        stack._modules[key] = Marker(calls)
    try:
        device = next(model.parameters()).device
        model.eval()(input_ids=torch.zeros(1, 4, dtype=torch.long, device=device), use_cache=False)
    except Exception as error:
        raise ValueError(
            f"pp > 1: {type(model).__name__} declares no pp_plan that covers its parameters, and could not be run "
            f"without its layers to find out: {error}. Give the model a `_pp_plan`, or use fsdp2."
        ) from error
    finally:
        config.pad_token_id = padding
        stack._modules.update(own)
        model.train(training)
        for handle in handles:
            handle.remove()
    if Marker.NAME not in calls:
        raise ValueError(f"pp > 1: {type(model).__name__} does not call its {layers} one by one. Use fsdp2, or tp.")
    first, last = calls.index(Marker.NAME), len(calls) - 1 - calls[::-1].index(Marker.NAME)
    parts = Parts(layers, tuple(dict.fromkeys(calls[:first])), tuple(dict.fromkeys(calls[last + 1 :])))
    if missing := _unplaced(model, parts):
        raise ValueError(
            f"pp > 1: {type(model).__name__} runs {missing[0]} neither before nor after its layers. Use fsdp2, or tp."
        )
    return parts


class Marker(nn.Module):
    """A layer that does nothing but note that it was called."""

    NAME = "<layer>"

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(self.NAME)
        return first_argument(args, kwargs)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states that a layer was called with."""
    return args[0] if args else kwargs["hidden_states"]


def split_model(model: nn.Module, parts: Parts, counts: Sequence[int], own: Sequence[int]) -> Split:
    """Take away, in place, what the stages `own` of a model do not use.

    Args:
        model: whole, on meta or real.
        parts: see `find_parts`.
        counts: layers per stage.
        own: indices of this rank's stages.
    """
    stages, start = [], 0
    for index, count in enumerate(counts):
        stages.append(Stage(index, range(start, start + count), index == 0, index == len(counts) - 1))
        start += count
    state = model.state_dict(keep_vars=True)
    split = Split(parts, stages, [stages[i] for i in own], list(state))
    split.tables = {name for name in parts.before if _looks_up(model.get_submodule(name))}
    mine = {layer for stage in split.own for layer in stage.layers}
    gone = [f"{parts.layers}.{i}" for i in range(start) if i not in mine]
    gone += [] if split.holds_first else [n for n in parts.before if not (split.holds_last and n in parts.after)]
    gone += [] if split.holds_last else [n for n in parts.after if not (split.holds_first and n in parts.before)]
    used = {id(p) for name, p in state.items() if not name.startswith(tuple(f"{n}." for n in gone))}
    ends = {id(p) for name in parts.before for p in model.get_submodule(name).parameters()}
    ends &= {id(p) for name in parts.after for p in model.get_submodule(name).parameters()}
    if split.holds_first != split.holds_last:
        split.shared = [name for name, p in model.named_parameters() if id(p) in ends]
    for name in gone:
        _remove(model, name, used, split)
    forget_absent_ties(model)  # type: ignore[arg-type]
    return split


def _looks_up(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Embedding) for inner in module.modules())


def _remove(model: nn.Module, name: str, used: set[int], split: Split) -> None:
    module = model.get_submodule(name)
    parameters = dict(module.named_parameters())
    kept = {key: p for key, p in parameters.items() if id(p) in used}
    if parameters and len(kept) == len(parameters):
        return  # the other end of a tie: its one weight is this rank's as well
    model.set_submodule(name, Absent(kept))
    split.absent.append(name)


# --- balancing --------------------------------------------------------------------------------------------------------


def even_counts(layers: int, stages: int) -> list[int]:
    """Layers per stage, as equal as can be; what is left over goes to the middle, away from embedding and head."""
    counts = [layers // stages] * stages
    middle = sorted(range(stages), key=lambda i: (abs(2 * i - (stages - 1)), i))
    for index in middle[: layers % stages]:
        counts[index] += 1
    return counts


def balanced_counts(costs: Sequence[float], first: float, last: float, stages: int) -> list[int]:
    """Layers per stage such that the dearest stage is as cheap as can be.

    Args:
        costs: of every layer.
        first: of what runs before the layers.
        last: of what runs after them.
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def of_stage(start: int, end: int, stage: int) -> float:
        return sums[end] - sums[start] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    # best[e]: the smallest dearest stage when the stages so far end before layer e, and where they begin
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(stages):
        reached: dict[int, tuple[float, list[int]]] = {}
        for end in range(stage + 1, len(costs) - (stages - stage - 1) + 1):
            options = [
                (max(worst, of_stage(start, end, stage)), [*counts, end - start])
                for start, (worst, counts) in best.items()
                if start < end
            ]
            reached[end] = min(options)
        best = reached
    return best[len(costs)][1]


def layer_costs(model: nn.Module, parts: Parts) -> tuple[list[float], float, float]:
    """Counted cost of every layer, of what runs before them and of what runs after: weights that a token multiplies."""
    active = _active_share(model)
    layers = [_multiplied(layer, active) for layer in find_blocks(model)]
    first, last = (
        sum((_multiplied(model.get_submodule(name), active) for name in names), 0.0)
        for names in (parts.before, parts.after)
    )
    return layers, first, last


def stage_costs(model: nn.Module, parts: Parts, counts: Sequence[int]) -> list[float]:
    """Counted cost of every stage, relative to their mean."""
    layers, first, last = layer_costs(model, parts)
    costs, start = [], 0
    for count in counts:
        costs.append(sum(layers[start : start + count]))
        start += count
    costs[0], costs[-1] = costs[0] + first, costs[-1] + last
    mean = sum(costs) / len(costs)
    return [cost / mean for cost in costs]


def _multiplied(module: nn.Module, active: float) -> float:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    weights: list[Tensor] = [p for p in module.parameters() if p.ndim >= 2 and id(p) not in tables]
    return float(sum(p.numel() * (active if p.ndim == 3 else 1) for p in weights))


def _active_share(model: nn.Module) -> float:
    """Of experts, stacked in weights of three dimensions, a token uses this share."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    experts = getattr(text, "num_experts", None) or getattr(text, "n_routed_experts", None)
    experts = experts or getattr(text, "num_local_experts", None)
    return getattr(text, "num_experts_per_tok", 0) / experts if experts else 1.0
