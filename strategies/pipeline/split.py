"""Find where to cut a decoder into pipeline stages, and remove the modules that a rank's stages do not use.

The model stays one Hugging Face model with its own names. Modules that other ranks hold are replaced by empty ones, so
layer numbers, layer kinds (sliding and full attention) and state-dict keys do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models._transformers import forget_absent_ties, has_tower
from automodel_trainer.models.parts import ModelParts as PartsByName
from automodel_trainer.nn.blocks import modules_around
from automodel_trainer.nn.text import first_line
from automodel_trainer.strategies.tensor.sequence import stacks

_HIDDEN = ["hidden_states"]


@dataclass(frozen=True)
class ModelParts:
    """A decoder's parts, by module name.

    Args:
        layers: the `nn.ModuleList` of its layers.
        before: modules with parameters that run before the first layer (embeddings, a vision tower, its projector).
        after: modules with parameters that run after the last layer (final norm, head).
        loose: parameters of tower and projector that belong to a module around the layers, such as what stands at the
            end of a picture's line. They are used where the projector is.
    """

    layers: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    loose: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One pipeline stage.

    Args:
        index: its place in the pipeline.
        layers: indices of its layers.
        first: whether it is the first stage, which also has the embeddings, and the tower where there is one.
        last: whether it is the last stage, which also has the final norm and the head.
    """

    index: int
    layers: range
    first: bool
    last: bool


@dataclass
class Split:
    """What a rank holds of a split model.

    Args:
        parts: the parts of the whole model.
        stages: all stages, in order.
        own: this rank's stages.
        names: names of all tensors of the whole model, in its order.
        absent: names of the modules, and of the loose parameters, that only other ranks hold.
        shared: names of the parameters that both the first and the last stage use, if these are on different ranks.
        tables: names of the modules before the layers that contain an embedding table.
    """

    parts: ModelParts
    stages: list[Stage]
    own: list[Stage]
    names: list[str]
    absent: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    tables: set[str] = field(default_factory=set)

    @property
    def holds_first(self) -> bool:
        """Whether this rank holds the first stage."""
        return any(stage.first for stage in self.own)

    @property
    def holds_last(self) -> bool:
        """Whether this rank holds the last stage."""
        return any(stage.last for stage in self.own)


class Absent(nn.Module):
    """Replaces a module that another rank holds.

    Args:
        kept: parameters of the module that this rank uses elsewhere (tied weights), by name.
    """

    def __init__(self, kept: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in kept.items():
            path, _, key = name.rpartition(".")
            self._inner(path).register_parameter(key, parameter)

    def _inner(self, path: str) -> nn.Module:
        """The module of that name in here, which is empty if it is new."""
        module: nn.Module = self
        for key in filter(None, path.split(".")):
            if key not in module._modules:
                module.add_module(key, nn.Module())
            module = module.get_submodule(key)
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: stages swap these modules out while they run."""
        raise AssertionError("a module of another pipeline stage was called")


def find_parts(model: nn.Module) -> ModelParts:
    """Find the parts of a decoder by the model's own `pp_plan`, or else by running it and noting the order.

    Raises:
        ValueError: the model is an encoder-decoder, has several stacks of layers, passes more than
            hidden states between layers, or cannot be run to find its parts.
    """
    kind = type(model).__name__
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"pp > 1 splits decoders, and {kind} also has an encoder. Use fsdp2, or tp.")
    found = [name for name in stacks(model) if _of_decoder(model, name)]
    if len(found) != 1:
        raise ValueError(
            f"pp > 1 splits one stack of layers, and {kind} has {len(found)} ({', '.join(found) or 'none'}). Use "
            "fsdp2, or tp."
        )
    beside, loose = _beside(model)
    parts = _planned(model, found[0], beside, loose) or _traced(model, found[0], beside, loose)
    _refuse_head_first(model, parts)
    return parts


def _of_decoder(model: nn.Module, name: str) -> bool:
    """Whether a module is no part of a tower beside the decoder."""
    return not has_tower(model) or PartsByName(model).of(name) == "language"  # type: ignore[arg-type]


def _beside(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Modules of tower and projector, and their parameters that belong to a module around the layers.

    They run before the first layer, where a micro-batch has pictures.
    """
    if not has_tower(model):
        return (), ()
    parts = PartsByName(model)  # type: ignore[arg-type]
    decoder = model.get_decoder()  # type: ignore[operator]
    around = modules_around(model, [decoder]) | {name for name, module in model.named_modules() if module is decoder}
    names = [name for name, _ in model.named_parameters() if parts.of(name) != "language"]
    owners = {name: name.rpartition(".")[0] for name in names}
    loose = tuple(name for name in names if owners[name] in around)
    return _outermost(sorted(set(owners.values()) - around)), loose


def _planned(model: nn.Module, layers: str, beside: tuple[str, ...], loose: tuple[str, ...]) -> ModelParts | None:
    """The parts by the model's `pp_plan`; None if there is no plan or it does not cover all parameters."""
    plan: dict[str, Any] = dict(getattr(model, "pp_plan", None) or {})
    if layers not in plan:
        return None
    # The plan maps a module to the names of its inputs and of its outputs.
    if list(plan[layers][1]) != _HIDDEN:
        raise ValueError(
            f"pp > 1 sends only hidden states between stages, and the layers of {type(model).__name__} pass on "
            f"{plan[layers][1]} (its pp_plan). Use fsdp2, or tp."
        )
    inner = [name for name in plan if name.rpartition(".")[0] == layers.rpartition(".")[0]]
    outer = [name for name in plan if name not in inner]  # the head: it runs last, but transformers lists it first
    place = inner.index(layers)
    before, after = inner[:place], [*inner[place + 1 :], *outer]
    modules = dict(model.named_modules())
    before = [*_with_parameters(modules, before), *beside]
    parts = ModelParts(layers, tuple(before), _with_parameters(modules, after), loose)
    return parts if not _unplaced(model, parts) else None


def _with_parameters(modules: dict[str, nn.Module], names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that exist and have parameters."""
    return tuple(n for n in names if n in modules and next(modules[n].parameters(), None) is not None)


def _unplaced(model: nn.Module, parts: ModelParts) -> list[str]:
    """Names of the parameters that belong to none of the parts."""
    known = tuple(f"{name}." for name in (parts.layers, *parts.before, *parts.after))
    names = (name for name, _ in model.named_parameters(remove_duplicate=False) if name not in parts.loose)
    return [name for name in names if not name.startswith(known)]


@torch.no_grad()
def _traced(model: nn.Module, layers: str, beside: tuple[str, ...], loose: tuple[str, ...]) -> ModelParts:
    """Run the model on four tokens without its layers, and note which modules are called before and after them."""
    # The model may be on meta, where values cannot be read: do not look for documents, or for padding.
    packing_without_sync(model)  # type: ignore[arg-type]
    config: Any = model.config
    padding = getattr(config, "pad_token_id", None)
    _without_padding(config)
    stack = model.get_submodule(layers)
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if not name.startswith(layers)
        and any(f"{name}.{key}".lstrip(".") not in loose for key, _ in module.named_parameters(recurse=False))
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
            f"pp > 1: {type(model).__name__} declares no pp_plan that covers its parameters, and its forward does not "
            f"run with stand-ins that return hidden states in place of its layers ({first_line(error)}). Use fsdp2 "
            "or tp instead, or give the model a `_pp_plan`."
        ) from error
    finally:
        config.pad_token_id = padding
        stack._modules.update(own)
        model.train(training)
        for handle in handles:
            handle.remove()
    if Marker.NAME not in calls:
        raise ValueError(
            f"pp > 1 needs a model that calls its layers one by one, and {type(model).__name__} does not call its "
            f"{layers} that way. Use fsdp2, or tp."
        )
    first, last = calls.index(Marker.NAME), len(calls) - 1 - calls[::-1].index(Marker.NAME)
    before = (*_outermost(calls[:first]), *beside)
    parts = ModelParts(layers, before, _outermost(calls[last + 1 :]), loose)
    if missing := _unplaced(model, parts):
        raise ValueError(
            f"pp > 1: {type(model).__name__} runs {missing[0]} neither before nor after its layers. Use fsdp2, or tp."
        )
    return parts


def _outermost(names: Sequence[str]) -> tuple[str, ...]:
    """Each name once, without those of modules inside of others."""
    once = dict.fromkeys(names)
    return tuple(n for n in once if not any(n.startswith(f"{other}.") for other in once))


def _without_padding(config: Any) -> None:
    with suppress(Exception):  # of the validator of a config that must have an id for it
        config.pad_token_id = None


class Marker(nn.Module):
    """A layer that returns its input and notes that it was called.

    Args:
        calls: the list of calls to add `NAME` to.
    """

    NAME = "<layer>"

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states `[b, s, h]`, unchanged."""
        self.calls.append(self.NAME)
        return first_argument(args, kwargs)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states `[b, s, h]` that a layer was called with."""
    return args[0] if args else kwargs["hidden_states"]


def split_model(model: nn.Module, parts: ModelParts, counts: Sequence[int], own: Sequence[int]) -> Split:
    """Remove, in place, the modules that this rank's stages do not use.

    Args:
        model: the whole model, on meta or real.
        parts: see `find_parts`.
        counts: the number of layers of every stage.
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
    ends = _used_at_both_ends(model, parts)
    if split.holds_first != split.holds_last:
        split.shared = [name for name, p in model.named_parameters() if id(p) in ends]
    for name in gone:
        _remove(model, name, used, split)
    for name in () if split.holds_first else parts.loose:
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner).register_parameter(key, None)
        split.absent.append(name)
    _forget_buffers(model, split.absent)
    forget_absent_ties(model)  # type: ignore[arg-type]
    return split


def _used_at_both_ends(model: nn.Module, parts: ModelParts) -> set[int]:
    """The ids of tied weights, which both ends of the pipeline use."""
    ends = {id(p) for name in parts.before for p in model.get_submodule(name).parameters()}
    return ends & {id(p) for name in parts.after for p in model.get_submodule(name).parameters()}


def _refuse_head_first(model: nn.Module, parts: ModelParts) -> None:
    """A shared weight has the name of its first module. The first stage cannot draw it under the name of the head."""
    shared, after = _used_at_both_ends(model, parts), tuple(f"{name}." for name in parts.after)
    for name, parameter in model.named_parameters():
        if id(parameter) in shared and name.startswith(after):
            raise ValueError(
                f"pp > 1: {type(model).__name__} declares its head before its embeddings, and they share {name}. Use "
                "fsdp2 or tp instead, or train them apart (config_overrides={'tie_word_embeddings': False})."
            )


def _looks_up(module: nn.Module) -> bool:
    """Whether a module contains an embedding table."""
    return any(isinstance(inner, nn.Embedding) for inner in module.modules())


def _remove(model: nn.Module, name: str, used: set[int], split: Split) -> None:
    """Replace a module by `Absent`, unless this rank uses all its parameters (by id in `used`) elsewhere."""
    module = model.get_submodule(name)
    parameters = dict(module.named_parameters())
    kept = {key: p for key, p in parameters.items() if id(p) in used}
    if parameters and len(kept) == len(parameters):
        return  # the other end of a tie, such as a tied head: this rank has its weight anyway
    model.set_submodule(name, Absent(kept))
    split.absent.append(name)


def _forget_buffers(model: nn.Module, absent: Sequence[str]) -> None:
    """Remove the buffers of modules of which nothing is left: the rule that draws their values needs what is absent."""
    for owner in {name.rpartition(".")[0] for name in absent}:
        module = model.get_submodule(owner)
        if next(module.parameters(), None) is None:
            module._buffers.update(dict.fromkeys(module._buffers))


# --- balancing --------------------------------------------------------------------------------------------------------


def even_counts(layers: int, stages: int) -> list[int]:
    """Layers per stage, as equal as possible. The rest goes to the middle stages, away from embedding and head."""
    counts = [layers // stages] * stages
    middle = sorted(range(stages), key=lambda i: (abs(2 * i - (stages - 1)), i))
    for index in middle[: layers % stages]:
        counts[index] += 1
    return counts


def balanced_counts(costs: Sequence[float], first: float, last: float, stages: int) -> list[int]:
    """Layers per stage that make the most expensive stage as cheap as possible.

    Args:
        costs: the cost of every layer.
        first: the cost of everything before the layers.
        last: the cost of everything after the layers.
        stages: number of stages.
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def stage_cost(start: int, end: int, stage: int) -> float:
        return sums[end] - sums[start] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    # Dynamic programming over stages. best[e]: if the stages so far end before layer e, the lowest possible cost of
    # the most expensive one, and the layers per stage that achieve it.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(stages):
        reached: dict[int, tuple[float, list[int]]] = {}
        # every stage has a layer, so this one ends after `stage` others and leaves one for each that follows
        for end in range(stage + 1, len(costs) - (stages - stage - 1) + 1):
            options = [
                (max(worst, stage_cost(start, end, stage)), [*counts, end - start])
                for start, (worst, counts) in best.items()
                if start < end
            ]
            reached[end] = min(options)
        best = reached
    return best[len(costs)][1]


def layer_costs(model: nn.Module, parts: ModelParts) -> tuple[list[float], float, float]:
    """The cost of every layer, of everything before the layers, and of everything after them.

    The cost is the number of weights that a token is multiplied with.
    """
    active = _active_share(model)
    layers = [_multiplied(layer, active) for layer in model.get_submodule(parts.layers).children()]
    first, last = (
        sum((_multiplied(model.get_submodule(name), active) for name in names), 0.0)
        for names in (parts.before, parts.after)
    )
    return layers, first, last


def stage_costs(model: nn.Module, parts: ModelParts, counts: Sequence[int]) -> list[float]:
    """The cost of every stage, relative to the mean; `counts` are the layers per stage."""
    layers, first, last = layer_costs(model, parts)
    costs, start = [], 0
    for count in counts:
        costs.append(sum(layers[start : start + count]))
        start += count
    costs[0], costs[-1] = costs[0] + first, costs[-1] + last
    mean = sum(costs) / len(costs)
    return [cost / mean for cost in costs]


def _multiplied(module: nn.Module, active: float) -> float:
    """The number of weights of a module that a token is multiplied with; `active` is the share of experts it uses."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}  # looked up, not multiplied
    weights: list[Tensor] = [p for p in module.parameters() if p.ndim >= 2 and id(p) not in tables]
    return float(sum(p.numel() * (active if p.ndim == 3 else 1) for p in weights))


def _active_share(model: nn.Module) -> float:
    """The share of the experts that a token uses; 1 for a dense model. Experts are stacked in 3-D weights."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    experts = getattr(text, "num_experts", None) or getattr(text, "n_routed_experts", None)
    experts = experts or getattr(text, "num_local_experts", None)
    return getattr(text, "num_experts_per_tok", 0) / experts if experts else 1.0
