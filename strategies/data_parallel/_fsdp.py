"""Every private torch name about FSDP2 (torch 2.11-2.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

__all__ = [
    "ShardedParameter",
    "initialize_sharding",
    "lay_out_gradients",
    "lay_out_gradients_at_once",
    "reduce_gradients",
    "sharded_parameters",
]


def initialize_sharding(model: FSDPModule) -> None:
    """Let FSDP2 find its modules now, while all of them are in their places."""
    _state(model)._lazy_init()


def reduce_gradients(model: FSDPModule) -> None:
    """Reduce the gradients that several backwards have accumulated without doing so (`set_requires_gradient_sync`)."""
    model.set_is_last_backward(True)
    model.set_reshard_after_backward(True)
    model.set_requires_gradient_sync(True)
    for group in _groups(model):
        group.post_backward()
    _state(model)._root_post_backward_final_callback()


class ShardedParameter:
    """FSDP2's record of a parameter."""

    def __init__(self, record: Any) -> None:
        self._record = record

    @property
    def owners(self) -> list[tuple[nn.Module, str]]:
        """The modules that hold it, and its name there."""
        info = self._record._module_info
        return [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names)]

    @property
    def shard(self) -> Tensor:
        """What this rank holds of it, without padding."""
        shard: Tensor = self._record._sharded_local_tensor
        return shard

    def gather_by(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Gather it by an extension (`fsdp_pre_all_gather`, `fsdp_post_all_gather`) instead of as it is."""
        shard: Any = self.shard
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = before, after
        self._record._init_extensions()


_MANY_RANKS = 8  # a part of each gradient for each of them takes the host longer than it saves the device
_chunk_cat = _fsdp_collectives.foreach_reduce_scatter_copy_in


def lay_out_gradients_at_once() -> None:
    """Let FSDP2 copy (and cast) a unit's gradients to where they are reduced from by `_foreach_copy_`.

    It takes 0.4 ms for a block of 218 million numbers on an H200, what FSDP2 calls (`_chunk_cat`) 0.8.
    """
    _fsdp_collectives.foreach_reduce_scatter_copy_in = lay_out_gradients


def lay_out_gradients(unsharded_grads: list[Tensor], reduce_scatter_input: Tensor, world_size: int) -> None:
    """Of every gradient `[n, …]` its part for rank 0, then those for rank 1 and so on, into one row of numbers."""
    uneven = any(len(gradient) % world_size for gradient in unsharded_grads)  # parts get padding
    if uneven or world_size > _MANY_RANKS:
        _chunk_cat(unsharded_grads, reduce_scatter_input, world_size)
        return
    sizes = [gradient.numel() // world_size for gradient in unsharded_grads]
    places = [place for rank in reduce_scatter_input.view(world_size, -1) for place in rank.split(sizes)]
    parts = [part for parts in zip(*(gradient.chunk(world_size) for gradient in unsharded_grads)) for part in parts]
    torch._foreach_copy_([place.view_as(part) for place, part in zip(places, parts)], parts)


def sharded_parameters(model: FSDPModule) -> list[ShardedParameter]:
    """The parameters of all units of `model`, whose sharding is initialized."""
    return [ShardedParameter(record) for group in _groups(model) for record in group.fsdp_params]


def _groups(model: FSDPModule) -> list[Any]:
    groups: list[Any] = []
    for each in _state(model)._state_ctx.all_states:
        # torch 2.11 has one group, 2.13 several
        several = getattr(each, "_fsdp_param_groups", None)
        groups += [each._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def _state(model: FSDPModule) -> Any:
    return fully_shard.state(model)  # type: ignore[attr-defined]
