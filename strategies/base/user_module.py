"""What is done to the blocks of a model, an objective's or one inside of a user's own LightningModule.

A user's own module calls its models itself, so a strategy cannot run its step (`forward_backward`); it can lay out its
parts, and checkpoint and compile its blocks as it does those of an objective's model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal
from weakref import WeakSet

import lightning.pytorch as pl
from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.strategies.base.activation_checkpointing import apply_activation_checkpointing
from automodel_trainer.strategies.base.compile import compile_blocks


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """What is laid out each by itself: the children that hold parameters, those of containers one by one."""
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # containers have no forward of their own
            yield from parts_of(child)
        else:
            yield child


def outermost(module: nn.Module, kind: type[nn.Module]) -> list[Any]:
    """The modules of this kind in `module`, itself included, that are not inside of another."""
    if isinstance(module, kind):
        return [module]
    return [found for child in module.children() for found in outermost(child, kind)]


class PreparedBlocks:
    """Checkpoints and compiles blocks, none of them twice."""

    def __init__(self) -> None:
        self.checkpointed: WeakSet[nn.Module] = WeakSet()
        self.compiled: WeakSet[nn.Module] = WeakSet()

    def __reduce__(self) -> Any:
        return PreparedBlocks, ()  # a process that a strategy is sent to has a model of its own

    def checkpoint(self, model: nn.Module, mode: Literal["full", "selective"]) -> None:
        """See `apply_activation_checkpointing`."""
        blocks = find_blocks(model)
        fresh = [block for block in blocks if block not in self.checkpointed]
        if fresh or not blocks:
            apply_activation_checkpointing(model, mode, fresh)
        self.checkpointed.update(fresh)

    def compile(
        self, model: nn.Module, backend: str, options: dict[str, Any] | None, asked: bool | Literal["auto"]
    ) -> None:
        """See `compile_blocks`. Where nobody asked ("auto"), a user's own module has those of transformers compiled."""
        own = asked == "auto" and isinstance(model, pl.LightningModule)
        blocks = [b for part in (outermost(model, PreTrainedModel) if own else [model]) for b in find_blocks(part)]
        fresh = [block for block in blocks if block not in self.compiled]
        if fresh or (not blocks and asked is True):
            compile_blocks(model, backend, fresh, options)
        self.compiled.update(fresh)
