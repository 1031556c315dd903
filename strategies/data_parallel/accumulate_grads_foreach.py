"""Accumulating the gradients of many small parameters: autograd would launch one kernel for each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from automodel_trainer.nn._torch import foreach_add_


@contextmanager
def accumulate_grads_foreach(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """A context around one backward. It accumulates into `grad` with a few kernels for all parameters together.

    The old gradients are set aside and added back afterwards, so while the backward runs each parameter has two.

    Args:
        parameters: whose gradients to accumulate; some may get no gradient in this backward.
    """
    before = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:  # a backward that failed must not lose the old gradients
        new = [(sum_, parameter.grad) for parameter, sum_ in before if parameter.grad is not None]
        for parameter, sum_ in before:
            parameter.grad = sum_
        if new:
            foreach_add_(*map(list, zip(*new)))
