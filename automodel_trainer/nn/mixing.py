"""Modules that stay what they are: same class (and a bit), same parameter names."""

from __future__ import annotations

from functools import cache

from torch import nn


@cache
def mixed(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """The class `cls` with `mixin` before it."""
    name = f"{mixin.__name__}_{cls.__name__}"
    return mixin if issubclass(mixin, cls) else type(name, (mixin, cls), {"__module__": cls.__module__})
