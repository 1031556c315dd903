"""Process groups that outlive a job of the pool, so that the next one starts none and DTensor knows its shardings.

A job asks for groups as in a process of its own. The default group is there already, and the n-th group that a job
makes of the same ranks with the same options is the n-th one of the jobs before. Equal meshes then have the same
groups, and DTensor's caches, which hand out any mesh that equals the one asked for, stay valid.
"""

from __future__ import annotations

import gc
import importlib
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.tensor._collective_utils import MeshTopoInfo
from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

Function = TypeVar("Function", bound=Callable[..., Any])

_made: dict[str, Any] = {}  # groups besides the default one
_asked: Counter[str] = Counter()  # how often this job asked for such a group


def own_groups(job: Function) -> Function:
    """Mark a job of the pool that starts or stops the default group itself: it finds none and leaves none."""
    job.own_groups = True  # type: ignore[attr-defined]
    return job


def has_own_groups(job: Callable[..., Any]) -> bool:
    return getattr(job, "own_groups", False)


def begin() -> None:
    """A job begins: the groups that it asks for are counted from here."""
    _asked.clear()


def forget() -> None:
    """Stop all groups and empty what refers to them."""
    if dist.is_initialized():
        dist.destroy_process_group()
    else:
        _forget_meshes()


def install() -> None:
    """Keep groups, in this process."""
    core = importlib.import_module("torch.distributed.distributed_c10d")
    mesh = importlib.import_module("torch.distributed.device_mesh")
    new_group, destroy = core.new_group, core.destroy_process_group

    @wraps(new_group)
    def kept(*args: Any, **kwargs: Any) -> Any:
        kind = repr((args, sorted(kwargs.items())))
        _asked[kind] += 1
        key = f"{_asked[kind]} of {kind}"
        if key not in _made:
            _made[key] = new_group(*args, **kwargs)
        return _made[key]

    @wraps(destroy)
    def forgotten(group: Any = None) -> None:
        if group is None or group is dist.group.WORLD:
            _made.clear()
            destroy(group)
            _forget_meshes()
            return
        for key in [key for key, made in _made.items() if made is group]:
            del _made[key]
        destroy(group)

    for module in (core, dist, mesh):
        module.new_group = kept  # type: ignore[attr-defined]
    for module in (core, dist):
        module.destroy_process_group = forgotten  # type: ignore[attr-defined]


def _forget_meshes() -> None:
    """Empty DTensor's caches: each holds the meshes that it has seen, and they the groups, which have threads.

    That of sharding also hands out meshes that equal a new one but name dead groups.
    """
    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()
    _gen_transform_infos.cache_clear()
    MeshTopoInfo.build_from_mesh.cache_clear()
    gc.collect()  # a mesh refers to itself
    gc.freeze()  # what is left are modules and caches, and no groups
