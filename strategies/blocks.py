"""Find the repeated blocks of a model: the unit of sharding, prefetch, checkpointing and compilation."""

from __future__ import annotations

from torch import nn


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of every outermost `nn.ModuleList` that hold parameters, in model order.

    That is where transformer stacks of any family keep their layers, vision towers and encoder-decoders included. A
    list inside a block (experts, say) belongs to its block.
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            blocks += [block for block in child if next(block.parameters(), None) is not None]
        else:
            blocks += find_blocks(child)
    return blocks
