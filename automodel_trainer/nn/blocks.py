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


def untied_input_embedding(model: nn.Module) -> list[nn.Module]:
    """The input embedding as a unit of its own, unless its weight is also used outside of it (tied to the head)."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except NotImplementedError:  # transformers' answer for models that cannot name one
        embedding = None
    if embedding is None or getattr(embedding, "weight", None) is None:
        return []
    inside_block = any(embedding is module for block in find_blocks(model) for module in block.modules())
    owners = [module for module in model.modules() if getattr(module, "weight", None) is embedding.weight]
    return [embedding] if len(owners) == 1 and not inside_block and embedding is not model else []
