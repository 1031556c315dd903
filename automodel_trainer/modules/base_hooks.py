"""Hooks that a subclass overrides without `super()`, as Lightning's own need none: the base does its work, too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_MARK, _HERE = "_keeps_base", "automodel_trainer."


def keep_base_hooks(kind: type[Any]) -> None:
    """Let overridden `on_…` hooks of a class run after those of its base here, unless they call these themselves.

    Metrics of an evaluation, the tokenizer of a checkpoint and the final check for NaN would be missing otherwise.
    """
    if kind.__module__.startswith(_HERE):
        return
    for name, own in list(vars(kind).items()):
        if not name.startswith("on_") or not inspect.isfunction(own):
            continue
        base = getattr(super(kind, kind), name, None)
        if not (hasattr(base, _MARK) or str(getattr(base, "__module__", "")).startswith(_HERE)):
            continue
        if name not in inspect.unwrap(own).__code__.co_names:  # neither super().name(…) nor Base.name(self, …)
            setattr(kind, name, _after(base, own))


def _after(base: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        base(self, *args, **kwargs)
        return own(self, *args, **kwargs)

    setattr(both, _MARK, True)
    return both
