"""Run code around a module's forward without changing the module's class or parameter names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def wrap(module: nn.Module, around: Forward) -> None:
    """Make the forward of `module` call `around(original_forward, *args, **kwargs)`.

    Wraps nest: the last one is the outermost.
    """
    original = own_forward(module)

    @functools.wraps(type(module).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def own_forward(module: nn.Module) -> Forward:
    """The current forward of `module`.

    If it is the forward of the class, it is looked up at each call, because sharding changes the module's class.
    """
    wrapped = module.__dict__.get("forward")
    return wrapped if wrapped is not None else _OfClass(module)


class _OfClass:
    """Calls the forward that the class of `module` has at the time of the call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)
