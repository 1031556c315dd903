"""Linear layers that multiply in fp8, through torchao: inputs, weights and gradients are cast on the fly.

Source: torchao.float8; FP8 formats, arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
MULTIPLE = 16  # of both sides of a weight: what the matrix units take


@dataclass(frozen=True)
class Fp8Layers:
    """What `convert_to_fp8` did.

    Args:
        recipe: how scales are chosen.
        converted: names of the layers that multiply in fp8.
        left: name of every other linear layer of the blocks -> why.
        has_history: scales come from the forwards before, so that none may be run twice.
    """

    recipe: str
    converted: list[str]
    left: dict[str, str] = field(default_factory=dict)
    has_history: bool = False

    def __str__(self) -> str:
        text = f"{len(self.converted)} linear layers in fp8 ({self.recipe})"
        return text + (f"; not {', '.join(f'{name} ({why})' for name, why in self.left.items())}" if self.left else "")


def convert_to_fp8(model: PreTrainedModel, recipe: str, device: torch.device, *, emulate: bool = False) -> Fp8Layers:
    """Make the linear layers in the blocks of `model` (on meta or real, not laid out yet) multiply in fp8, in place.

    Parameters stay what they are, and so do their names; head and embeddings are left alone.

    Args:
        recipe: "tensorwise" (fastest), "rowwise" (more exact), "rowwise_with_gw_hp" (gradients of weights in bf16).
        device: that will compute.
        emulate: compute in fp32 what fp8 would: for a device without it.

    Raises:
        ValueError: an unknown recipe, no torchao, a device without fp8, or no layer whose shape suits.
    """
    from automodel_trainer.strategies.blocks import find_blocks  # strategies import models

    if recipe not in RECIPES:
        raise ValueError(f"fp8={recipe!r} is unknown. Allowed: {', '.join(RECIPES)}, or null for none.")
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(f"fp8={recipe!r} needs an NVIDIA GPU of the Ada, Hopper or a later kind. Set fp8 to null.")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(f"fp8={recipe!r} needs torchao: pip install 'automodel-trainer[fp8]'.") from error
    inside = {id(module) for block in find_blocks(model) for module in block.modules()}
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
    left = {name: why for name, module in linear.items() if (why := _unsuitable(module))}
    converted = [name for name in linear if name not in left]
    if not converted:
        raise ValueError(
            f"fp8={recipe!r} would change nothing: {type(model).__name__} has no linear layer in its blocks with sides "
            f"that are multiples of {MULTIPLE}" + (f" ({_some(left)})." if left else ".") + " Set fp8 to null."
        )
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in set(converted))
    layers = Fp8Layers(recipe, converted, left)
    model.fp8_layers = layers  # type: ignore[assignment]
    return layers


def fp8_layers(model: nn.Module) -> Fp8Layers | None:
    """What of `model` multiplies in fp8."""
    found: Any = getattr(model, "fp8_layers", None)
    return found if isinstance(found, Fp8Layers) else None


def _unsuitable(module: nn.Linear) -> str | None:
    if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
        return f"{module.out_features} × {module.in_features}"
    return None if type(module) is nn.Linear else f"a {type(module).__name__}"


def _some(left: dict[str, str]) -> str:
    shown = [f"{name}: {why}" for name, why in list(left.items())[:3]]
    return ", ".join(shown) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
