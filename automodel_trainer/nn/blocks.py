"""Find the repeated blocks of a model: the units of sharding, prefetch, checkpointing and compilation."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of every outermost `nn.ModuleList` that have parameters, in model order.

    Transformers of every family keep their layers in such lists, including vision towers and encoder-decoders. A list
    inside a block (of experts, for example) belongs to that block.
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            blocks += [block for block in child if next(block.parameters(), None) is not None]
        else:
            blocks += find_blocks(child)
    return blocks


def untied_input_embedding(model: nn.Module) -> list[nn.Module]:
    """The input embedding as a list of one module, or an empty list if it cannot be a unit of its own.

    It cannot if its weight is used elsewhere too (tied to the head), if it lies inside a block, or if it is the model.
    """
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except NotImplementedError:  # transformers raises this for models that do not name their embedding
        embedding = None
    if embedding is None or getattr(embedding, "weight", None) is None:
        return []
    inside_block = any(embedding is module for block in find_blocks(model) for module in block.modules())
    owners = [module for module in model.modules() if getattr(module, "weight", None) is embedding.weight]
    return [embedding] if len(owners) == 1 and not inside_block and embedding is not model else []


def modules_around(model: nn.Module, inner: Iterable[nn.Module]) -> set[str]:
    """The names of the modules of `model` that have one of `inner` somewhere inside them."""
    wanted = set(map(id, inner))
    names = [name for name, module in model.named_modules(remove_duplicate=False) if name and id(module) in wanted]
    parts = [name.split(".") for name in names]
    return {".".join(path[:depth]) for path in parts for depth in range(len(path))}
