"""A new head on a body that a checkpoint holds: which weights may be missing, and start from random values."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.nn.text import listed


def new_heads(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """Names of modules that are missing as a whole, and that the body can do without: heads and poolers.

    They hold a matrix. They are no embedding and lie in no block, because a checkpoint that lacks those is damaged.

    Args:
        model: the model that the checkpoint is read into.
        missing: names of the parameters that the checkpoint lacks.
    """
    names = set(missing)
    inside = {id(part) for block in find_blocks(model) for part in block.modules()}
    found: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        if not name or not own or not own <= names or any(name.startswith(f"{head}.") for head in found):
            continue
        parts = list(module.modules())
        body = any(id(part) in inside or isinstance(part, nn.Embedding) for part in parts)
        if not body and any(parameter.ndim > 1 for parameter in module.parameters()):
            found.append(name)
    return found


def tell_new_heads(model: PreTrainedModel, heads: Iterable[str], folder: object) -> None:
    """Warn that heads start from random weights."""
    heads = list(heads)
    if heads:
        name = type(model).__name__.removeprefix("FSDP")  # FSDP2 puts a class of its own before the model's
        warnings.warn(
            f"{folder} holds no {listed(heads)} of {name}: it starts from random weights. Train it before you use it.",
            stacklevel=4,
        )
