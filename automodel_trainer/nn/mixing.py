"""Give a module more behaviour by changing its class, with its parameter names unchanged."""

from __future__ import annotations

from functools import cache

from torch import nn


@cache
def mixed(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `mixin` and `cls`, in this order; `mixin` itself if it already is a subclass of `cls`.

    Cached, so that equal modules share one class.
    """
    name = f"{mixin.__name__}_{cls.__name__}"
    return mixin if issubclass(mixin, cls) else type(name, (mixin, cls), {"__module__": cls.__module__})
