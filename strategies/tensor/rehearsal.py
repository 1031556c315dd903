"""Try out, on a small copy and in one process, what a model's plan does not say.

Does it read weights outside of the layers that hold them? Tensor parallel makes every parameter a DTensor, and lets a
layer see its own as plain tensors while it runs. Code of the model around its layers would meet a DTensor among plain
tensors, which torch refuses.

Which layers work on the columns of a cut one? Each rank has some of these columns, such as its heads, so the gradients
of a norm behind them are partial. Some plans forget it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models.rehearsal import logits_of, rehearse
from automodel_trainer.models.small_copy import text_inputs
from automodel_trainer.nn._torch import pytree
from automodel_trainer.nn.wrap import wrap
from automodel_trainer.strategies.tensor.local_parameters import readers
from automodel_trainer.strategies.tensor.plan import BETWEEN, layer_pattern

NO_RULES: Mapping[str, str] = MappingProxyType({})
_forgotten: dict[tuple[type, str, str], dict[str, str]] = {}


def check_reads(model: PreTrainedModel, given: Mapping[str, str] = NO_RULES) -> None:
    """Check that a model reads its weights only in the forwards of the layers that hold them.

    Args:
        model: on meta or real.
        given: as of `forgotten_rules`, which looks at the same copy.

    Raises:
        ValueError: it does not.
    """
    found = rehearse(model, _name(given), _with_weights_away)
    if found is not None:
        raise ValueError(
            f"tp > 1 cuts weights, which then only the layers that hold them can read, and a small copy of "
            f"{type(model).__name__} {found}. Set tp=1, and shard with fsdp2 instead."
        )


def forgotten_rules(model: PreTrainedModel, given: Mapping[str, str] = NO_RULES) -> dict[str, str]:
    """Rules that a model's plan lacks: of layers that work on a part of what a layer beside them, cut by columns, made.

    Args:
        model: on meta or real.
        given: rules that override the model's own.
    """
    rules = {**(getattr(model, "tp_plan", None) or {}), **given}
    if not any(_unruled(model, rules)):
        return {}
    name = _name(given)
    found = _forgotten.setdefault((type(model), model.config.to_json_string(), name), {})
    rehearse(model, name, _with_weights_away, partial(_watching, rules=rules, found=found))
    return found


def _name(given: Mapping[str, str]) -> str:
    return f"reads {sorted(given.items())}"


def _unruled(model: nn.Module, rules: Mapping[str, str]) -> list[tuple[str, nn.Module, list[nn.Module]]]:
    """Layers with parameters and without a rule, by their patterns, and the layers beside them that columns cut."""
    found = []
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        names = [name, *(f"{name}.{key}" for key, _ in module.named_parameters(recurse=False))]
        if len(names) == 1 or any(layer_pattern(each) in rules or each in rules for each in names):
            continue
        beside = model.get_submodule(parent).named_children()
        cut = [child for key, child in beside if key != own and _rule(rules, f"{parent}.{key}") == "colwise"]
        if cut:
            found.append((layer_pattern(name), module, cut))
    return found


def _rule(rules: Mapping[str, str], name: str) -> str | None:
    return rules.get(name) or rules.get(layer_pattern(name))


@contextmanager
def _watching(model: nn.Module, rules: Mapping[str, str], found: dict[str, str]) -> Iterator[None]:
    """A context in which a forward of a copy of the model writes rules of what sees parts of columns into `found`."""
    made: dict[int, Tensor] = {}  # by their memory, which is kept while they are here

    def note(module: nn.Module, args: Any, output: Any) -> None:
        made[output.untyped_storage().data_ptr()] = output

    def look(module: nn.Module, args: Any, name: str) -> None:
        seen = args[0] if args and isinstance(args[0], Tensor) else None
        whole = None if seen is None else made.get(seen.untyped_storage().data_ptr())
        if seen is not None and whole is not None and seen.shape[-1] < whole.shape[-1]:
            found[name] = BETWEEN

    unruled = _unruled(model, rules)
    cut = {id(module): module for _, _, beside in unruled for module in beside}
    hooks = [module.register_forward_hook(note) for module in cut.values()]
    hooks += [module.register_forward_pre_hook(partial(look, name=name)) for name, module, _ in unruled]
    yield
    for hook in hooks:
        hook.remove()


class _Away(Tensor):
    """A parameter as seen from outside of its layer: like a DTensor, it does not mix with plain tensors."""

    of: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        name = next(tensor.of for tensor in tensors if isinstance(tensor, _Away))
        if any(tensor.ndim > 0 for tensor in tensors if type(tensor) is not _Away):
            raise RuntimeError(f"{name} is read outside of its layer")
        result = super().__torch_function__(func, types, args, kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, _Away):
                leaf.of = name
        return result


def _with_weights_away(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits for ids `[b, s]`, where parameters are plain tensors in the layers that hold them and nowhere else."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for reader, parts in readers(model):
        wrap(reader, _seeing([(part, key, p) for part in parts for key, p in part.named_parameters(recurse=False)]))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            away = parameter.detach().as_subclass(_Away)
            away.of = names[parameter]
            module._parameters[key] = away  # type: ignore[assignment]
    return logits_of(model(**text_inputs(model, ids)))


def _seeing(parameters: list[tuple[nn.Module, str, nn.Parameter]]) -> Any:
    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        before = [module._parameters[key] for module, key, _ in parameters]
        try:
            for module, key, parameter in parameters:
                module._parameters[key] = parameter
            return original(*args, **kwargs)
        finally:
            for (module, key, _), value in zip(parameters, before):
                module._parameters[key] = value

    return around
