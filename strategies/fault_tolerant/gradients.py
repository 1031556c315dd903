"""Sum gradients over replica groups, some megabytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from automodel_trainer.strategies.fault_tolerant.state import local

BUCKET = 64 * 2**20  # bytes


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], add_up: Callable[[Tensor], None]) -> None:
    """Replace the gradients by their sums. Every group must have the same parameters.

    A parameter that no rank of any group has used keeps no gradient, as in a plain run.

    Args:
        parameters: the trained ones.
        add_up: sums a flat tensor in place.
    """
    for bucket in _buckets(parameters):
        flat = torch.cat([_flat(parameter) for parameter in bucket])
        add_up(flat)
        for parameter, part in zip(bucket, flat.split([local(parameter).numel() for parameter in bucket])):
            if parameter.grad is None:
                if not part.any():
                    continue
                parameter.grad = torch.zeros_like(parameter)
            gradient = local(parameter.grad)
            gradient.copy_(part.view_as(gradient))


def _flat(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return (torch.zeros_like(local(parameter)) if gradient is None else local(gradient)).reshape(-1)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype, as long as they are small."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        own = local(parameter)
        if bucket and (size + own.nbytes > BUCKET or own.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += own.nbytes
    if bucket:
        yield bucket
