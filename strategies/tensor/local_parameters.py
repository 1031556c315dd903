"""Let modules see their parameters as this rank's local tensors while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from automodel_trainer.nn.blocks import find_blocks, modules_around, untied_input_embedding
from automodel_trainer.nn.wrap import Forward
from automodel_trainer.strategies.tensor.collectives import sum_gradient

Held = list[tuple[nn.Module, str, bool]]  # module, parameter name, whether to sum its gradient over ranks


def readers(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The modules around whose forward parameters are swapped, and the modules whose parameters these are.

    A block swaps in all parameters inside it at once. So does a module outside of blocks, which may read those of its
    children by itself, unless it contains a block or an embedding that is gathered on its own: such a module swaps in
    the parameters that it holds.
    """
    blocks = find_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    around = modules_around(model, [*blocks, *untied_input_embedding(model)])
    for block in blocks:
        yield block, list(block.modules())
    for name, module in model.named_modules():
        if id(module) in inside or next(module.parameters(), None) is None:
            continue
        if name not in around:
            yield module, list(module.modules())
        elif next(module.parameters(recurse=False), None) is not None:
            yield module, [module]


def with_local_parameters(held: Held, group: ProcessGroup) -> Forward:
    """A wrapper (see `wrap`) that runs a forward inside `local_parameters`."""

    def forward(original: Forward, *args: Any, **kwargs: Any) -> Any:
        with local_parameters(held, group):
            return original(*args, **kwargs)

    return forward


@contextmanager
def local_parameters(held: Held, group: ProcessGroup) -> Iterator[None]:
    """A context in which the parameters `held` are plain tensors: this rank's shards.

    Args:
        held: module, parameter name, and whether the parameter's gradient is partial.
        group: the ranks to sum partial gradients over.
    """
    swapped: list[Any] = []
    try:
        for module, key, summed in held:
            parameter = module._parameters[key]
            if isinstance(parameter, DTensor):  # otherwise an outer wrapper has swapped it already
                local = parameter.to_local()
                local = sum_gradient(local, group, wide=True) if summed else local
                swapped.append((module, key, parameter))
                module._parameters[key] = local  # type: ignore[assignment]
        yield
    finally:
        for module, key, parameter in swapped:
            module._parameters[key] = parameter
