"""Decides which weights of a model get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from automodel_trainer.models.lora.config import LoRAConfig
from automodel_trainer.models.lora.layers import LINEAR
from automodel_trainer.models.parts import ModelParts, frozen_parts
from automodel_trainer.nn.experts import stacks_experts

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target:
    """A weight that gets an adapter: of the linear module `name`, or the parameter `name`."""

    name: str
    rank: int
    scaling: float


def candidates(model: nn.Module) -> dict[str, bool]:
    """Everything that can have an adapter: linear modules, fused experts, single matrices called `weight`.

    Other parameters of three dimensions (of convolutions, say) are no stacks of matrices.

    Returns:
        name -> whether `all-linear` includes it. That is linear layers and fused expert weights, without the head and
        without single matrices such as a router's. What `freeze_parts` froze is left out.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found: dict[str, bool] = {}
    for name, module in model.named_modules():
        if isinstance(module, LINEAR) and _computes_as_linear(module):
            found[name] = module is not head
        elif not isinstance(module, nn.Embedding):
            for key, parameter in module.named_parameters(recurse=False):
                fused = stacks_experts(module, parameter)
                if name and (fused or (parameter.ndim == 2 and key == "weight")):
                    found[f"{name}.{key}"] = fused
    return _without_frozen(model, found)


@torch.no_grad()
def _computes_as_linear(module: nn.Module) -> bool:
    """Whether a linear layer, perhaps of a class with a forward of its own, gives `[…, outputs]` for `[…, inputs]`.

    Some routers are linear layers that return their choices, and some layers multiply groups with parts of the weight.
    """
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight: Tensor = module.weight  # type: ignore[assignment]
    outputs, inputs = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    try:
        found = module(torch.zeros(2, 3, inputs, dtype=weight.dtype, device=weight.device))
    except Exception:  # of a forward that takes something else
        return False
    return isinstance(found, Tensor) and found.shape == (2, 3, outputs)


def _without_frozen(model: nn.Module, found: dict[str, bool]) -> dict[str, bool]:
    """`found` without weights that the user froze, and without those of parts that `all-linear` does not mean."""
    frozen = frozen_parts(model)
    if frozen is None:
        return found
    assert isinstance(model, PreTrainedModel)
    parts = ModelParts(model)
    kept = {n: meant for n, meant in found.items() if n not in frozen.names and f"{n}.weight" not in frozen.names}
    return {name: meant and parts.of(name) not in frozen.apart for name, meant in kept.items()}


def find_targets(model: nn.Module, config: LoRAConfig) -> list[Target]:
    """The weights that `config` asks for, in the model's order.

    Raises:
        ValueError: a pattern matches nothing, matches a layer in some blocks and misses it in others, or means a module
            that `modules_to_save` trains whole. The message lists what would match.
    """
    known = candidates(model)
    if not any(known.values()):
        raise ValueError(f"{type(model).__name__} has no linear layers outside its head: LoRA has nothing to adapt.")
    asked = config.target_modules
    if isinstance(asked, str) and asked.lower() == ALL_LINEAR:
        chosen = {name for name, meant in known.items() if meant and not _within(name, config.modules_to_save)}
    else:
        chosen = _match_all(known, asked)
        if twice := [name for name in known if name in chosen and _within(name, config.modules_to_save)]:
            raise ValueError(
                f"lora target_modules: {kinds(twice)} is trained whole by modules_to_save={config.modules_to_save}, "
                "which leaves an adapter nothing to do. Leave it out of one of the two."
            )
    for pattern in config.exclude:
        out = {name for name in known if matches(name, pattern)}
        if not out & chosen:
            raise ValueError(f"lora exclude: {pattern!r} excludes nothing that is targeted. Targeted: {kinds(chosen)}.")
        chosen -= out
    if not chosen:
        raise ValueError(f"lora target_modules minus exclude leaves nothing. There are: {kinds(known)}.")
    return [Target(name, config.rank, config.scaling(config.rank)) for name in known if name in chosen]


def _within(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module, or one that it is a part of, is meant by one of the patterns."""
    parts = name.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(matches(module, pattern) for module in modules for pattern in patterns)


def _match_all(known: Mapping[str, bool], asked: str | list[str]) -> set[str]:
    patterns = [asked] if isinstance(asked, str) else asked
    found = {
        pattern: {name for name in known if (matches_regex if isinstance(asked, str) else matches)(name, pattern)}
        for pattern in patterns
    }
    for pattern, names in found.items():
        if not names:
            module = pattern.removesuffix(".weight")
            hint = f" A linear layer (nn.Linear, Conv1D) is meant by its module's name: {module!r}."
            raise ValueError(
                f"lora target_modules: {pattern!r} matches nothing. Would match: {kinds(known)}, or 'all-linear'."
                f"{hint if module != pattern else ''}"
            )
    chosen = set().union(*found.values())
    if len(found) > 1:
        _check_siblings(known, found, chosen)
    return chosen


def _check_siblings(known: Mapping[str, bool], found: Mapping[str, set[str]], chosen: set[str]) -> None:
    """Refuse a pattern that matches a layer in some blocks only, if other patterns match theirs in all blocks."""
    members: dict[str, set[str]] = {}
    for name in known:
        members.setdefault(kind(name), set()).add(name)
    part = {k: names - chosen for k, names in members.items() if names & chosen and names - chosen}
    whole = any(names & chosen and not names - chosen for names in members.values())
    for pattern, names in found.items():
        for k in sorted({kind(name) for name in names} & part.keys()):
            if whole:
                raise ValueError(
                    f"lora target_modules: {pattern!r} matches {k} in some layers but misses {some(part[k])}, while "
                    f"other patterns match all of their layers. {k!r} would match them all; to adapt some layers "
                    "only, give one regular expression instead of a list."
                )


def matches(name: str, pattern: str) -> bool:
    """Whether the pattern is the name, the end of the name, or a glob over either.

    A single matrix called `weight` is matched only by a pattern that ends in `weight`.
    """
    if name.endswith(".weight") and not pattern.endswith("weight"):
        return False
    return (
        name == pattern or name.endswith("." + pattern) or any(fnmatchcase(name, p) for p in (pattern, "*." + pattern))
    )


def matches_regex(name: str, pattern: str) -> bool:
    """Whether the pattern matches the whole name as a regular expression, or is the end of the name.

    Raises:
        ValueError: it is not a regular expression.
    """
    if name.endswith(".weight") and "weight" not in pattern:
        return False
    try:
        return re.fullmatch(pattern, name) is not None or name.endswith("." + pattern)
    except re.error as error:
        raise ValueError(
            f"lora target_modules={pattern!r} is not a regular expression ({error}). Give names or globs as a list."
        ) from error


def kind(name: str) -> str:
    """The name with `*` in place of layer numbers, so that it is the same in every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def kinds(names: Iterable[str]) -> str:
    """The different kinds of these names, for a message."""
    return ", ".join(dict.fromkeys(kind(name) for name in names))


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
