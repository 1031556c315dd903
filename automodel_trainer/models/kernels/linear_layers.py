"""The linear layers of a model's blocks."""

from __future__ import annotations

from torch import nn

from automodel_trainer.models.lora.layers import adapters
from automodel_trainer.nn.blocks import find_blocks


def block_linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers of the blocks, by name, without the factors of adapters."""
    inside = {id(module) for block in find_blocks(model) for module in block.modules()}
    inside -= {id(factor) for adapter in adapters(model) for factor in (adapter.a, adapter.b)}
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
