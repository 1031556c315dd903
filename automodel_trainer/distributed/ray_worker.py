"""What a worker of Ray Train knows about the run it belongs to. Ray is never imported here: a worker has."""

from __future__ import annotations

import sys
from typing import Any


def ray_context() -> Any:
    """Ray Train's context of this process; None outside of a worker."""
    train = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        return context if context.get_world_size() is not None else None
    except (RuntimeError, AttributeError, DeprecationWarning):  # in a process that is not a worker; in a trial of Tune
        return None


def ray_sizes() -> tuple[int, int] | None:
    """Workers on this node and number of nodes; None outside of a worker."""
    context = ray_context()
    if context is None:
        return None
    local = context.get_local_world_size()
    return local, max(1, context.get_world_size() // local)
