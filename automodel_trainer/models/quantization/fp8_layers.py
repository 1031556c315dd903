"""Records which layers of a model multiply in fp8, for the ledger, activation checkpointing and FSDP2."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from automodel_trainer.models.record import recorded

TENSORWISE = "tensorwise"


@dataclass(frozen=True)
class Fp8Layers:
    """What `convert_to_fp8` or `swap_linear_layers` did. An entry of the model's record.

    Args:
        recipe: how scales are chosen.
        converted: names of the layers that multiply in fp8.
        left: every other linear layer of the blocks -> why it does not.
        has_history: scales come from earlier forwards, so no forward may run twice in a step.
        frozen: those of `converted` whose weight is held in fp8.
        all_gather: what the user asked of FSDP2: gather trained weights in fp8 (True), not (False), or "auto".
        gathered: whether FSDP2 gathers them in fp8.
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
        """Layers whose trained weight has a single scale, so that every rank can cast its shard with it."""
        return [name for name in self.converted if name not in self.frozen] if self.recipe == TENSORWISE else []

    def __str__(self) -> str:
        text = f"{len(self.converted)} linear layers in fp8 ({self.recipe})"
        text += f", {len(self.frozen)} weights held in fp8" if self.frozen else ""
        text += f", {len(self.gatherable)} weights gathered in fp8" if self.gathered else ""
        return text + (f"; not {', '.join(f'{name} ({why})' for name, why in self.left.items())}" if self.left else "")


def fp8_layers(model: nn.Module) -> Fp8Layers | None:
    """Which layers of `model` multiply in fp8; None: no layer does."""
    return recorded(model, Fp8Layers)


def check_gathered(model: nn.Module) -> None:
    """Check that the layout gathers weights in fp8, if the user asked for that.

    Raises:
        ValueError: it does not; the message says which layout would.
    """
    layers = fp8_layers(model)
    if layers is not None and layers.all_gather is True and not layers.gathered:
        raise ValueError(
            "kernels fp8_all_gather=true: FSDP2 gathers weights in fp8 where it shards them over several ranks, and "
            "this layout does not. Use strategy='fsdp2' on two devices or more, or leave fp8_all_gather at 'auto'."
        )
