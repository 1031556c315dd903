"""What of a model multiplies in fp8, for those who ask (the ledger, activation checkpointing)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Fp8Layers:
    """What `convert_to_fp8` did.

    Args:
        recipe: how scales are chosen.
        converted: names of the layers that multiply in fp8.
        left: name of every other linear layer of the blocks -> why.
        has_history: scales come from the forwards before, so that none may be run twice.
        frozen: those of `converted` whose weight is held in fp8.
    """

    recipe: str
    converted: list[str]
    left: dict[str, str] = field(default_factory=dict)
    has_history: bool = False
    frozen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.converted)} linear layers in fp8 ({self.recipe})"
        text += f", {len(self.frozen)} weights held in fp8" if self.frozen else ""
        return text + (f"; not {', '.join(f'{name} ({why})' for name, why in self.left.items())}" if self.left else "")


def fp8_layers(model: nn.Module) -> Fp8Layers | None:
    """What of `model` multiplies in fp8."""
    found: Any = getattr(model, "fp8_layers", None)
    return found if isinstance(found, Fp8Layers) else None
