"""Put something around a module's forward, and leave the module what it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def wrap(module: nn.Module, around: Forward) -> None:
    """Make `module` run `around(its forward, *args, **kwargs)`."""
    original = own_forward(module)

    @functools.wraps(type(module).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def own_forward(module: nn.Module) -> Forward:
    """What runs as `module`'s forward now; its class's is looked up when it runs, for sharding changes classes."""
    wrapped = module.__dict__.get("forward")
    return wrapped if wrapped is not None else _OfClass(module)


class _OfClass:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)
