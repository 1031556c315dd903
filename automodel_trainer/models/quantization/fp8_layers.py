"""What of a model multiplies in fp8, for those who ask (the ledger, activation checkpointing, FSDP2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

TENSORWISE = "tensorwise"


@dataclass(frozen=True)
class Fp8Layers:
    """What `convert_to_fp8` did.

    Args:
        recipe: how scales are chosen.
        converted: names of the layers that multiply in fp8.
        left: name of every other linear layer of the blocks -> why.
        has_history: scales come from the forwards before, so that none may be run twice.
        frozen: those of `converted` whose weight is held in fp8.
        all_gather: whether FSDP2 shall gather trained weights in fp8: True, False, or "auto".
        gathered: whether it does.
    """

    recipe: str
    converted: list[str]
    left: dict[str, str] = field(default_factory=dict)
    has_history: bool = False
    frozen: list[str] = field(default_factory=list)
    all_gather: bool | str = "auto"
    gathered: bool = False

    @property
    def gatherable(self) -> list[str]:
        """Layers whose trained weight has one scale, which all its shards can be cast with."""
        return [name for name in self.converted if name not in self.frozen] if self.recipe == TENSORWISE else []

    def __str__(self) -> str:
        text = f"{len(self.converted)} linear layers in fp8 ({self.recipe})"
        text += f", {len(self.frozen)} weights held in fp8" if self.frozen else ""
        text += f", {len(self.gatherable)} weights gathered in fp8" if self.gathered else ""
        return text + (f"; not {', '.join(f'{name} ({why})' for name, why in self.left.items())}" if self.left else "")


def fp8_layers(model: nn.Module) -> Fp8Layers | None:
    """What of `model` multiplies in fp8."""
    found: Any = getattr(model, "fp8_layers", None)
    return found if isinstance(found, Fp8Layers) else None


def check_gathered(model: nn.Module) -> None:
    """ValueError where it was asked to gather weights in fp8, and this layout gathers none."""
    layers = fp8_layers(model)
    if layers is not None and layers.all_gather is True and not layers.gathered:
        raise ValueError(
            "kernels fp8_all_gather=true: FSDP2 gathers weights in fp8 where it shards them over several ranks, and "
            "this layout does not. Use strategy='fsdp2' on two devices or more, or leave fp8_all_gather at 'auto'."
        )
