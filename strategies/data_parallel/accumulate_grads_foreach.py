"""Gradients of many small parameters over micro-batches: autograd adds them one by one, a kernel each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def accumulate_grads_foreach(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Around a backward: what `grad` held before it is added after it, by a few kernels for all parameters.

    Holds a second gradient of each of them for as long as the backward runs.
    """
    before = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        new = [(sum_, parameter.grad) for parameter, sum_ in before if parameter.grad is not None]
        for parameter, sum_ in before:
            parameter.grad = sum_
        if new:
            torch._foreach_add_(*map(list, zip(*new)))
