"""Every use of a private torch name in the strategies, and names that changed (torch 2.11-2.13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.pipelining import PipelineStage as TorchPipelineStage
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = [
    "PipelineStage",
    "ShardedParameter",
    "StridedShard",
    "all_gather_first",
    "all_reduce_sum",
    "allow_side_effects_in_checkpoints",
    "flatten_mesh",
    "initialize_sharding",
    "lay_out_gradients_at_once",
    "overlap_matmuls_with_collectives",
    "placeable",
    "prefer_recomputing",
    "raise_recompile_limit",
    "reduce_gradients",
    "reduce_scatter_first",
    "set_allocator",
    "sharded_parameters",
    "unviewed",
]

# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# Inside of a compiled function collectives are the functional ones, which the compiler can see (and overlap); outside,
# the plain ones, which cost less on the host.


def all_reduce_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' `x`, a new tensor."""
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.group_name))
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def all_gather_first(x: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' contiguous `[n, …]`, one after the other: `[ranks · n, …]`."""
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.all_gather_into_tensor(x, group.size(), group.group_name))
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(whole, x, group=group)
    return whole


def reduce_scatter_first(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's `[n, …]` of the sum of the ranks' contiguous `[ranks · n, …]`."""
    if torch.compiler.is_compiling():
        return _waited(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name))
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_scatter(part, x, group=group)
    return part


def _waited(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)  # type: ignore[no-any-return]


def raise_recompile_limit() -> None:
    """Blocks of several kinds share one compiled function: dynamo's 8 variants of it may be too few."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def allow_side_effects_in_checkpoints() -> None:
    """Let compiled code that is checkpointed change Python objects, once: its backward is a graph, and runs no Python.

    Tensor parallel takes a layer's bias away while the layer runs.
    """
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def set_allocator(settings: str) -> None:
    """As the environment variable PYTORCH_ALLOC_CONF would, also when torch has begun."""
    torch._C._accelerator_setAllocatorSettings(settings)


def prefer_recomputing() -> None:
    """Let compiled backwards recompute what is cheap (activations, norms) also where a matmul reads it.

    By default such tensors are kept from the forward. They are a fifth of a block's activations when it is adapted by
    LoRA, whose factors' gradients read every input.
    """
    torch._functorch.config.ban_recompute_materialized_backward = False


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """A multi-dimensional mesh as one axis called `name`. Asked for twice, the same mesh comes back."""
    return mesh._flatten(name)


def placeable(tensor: DTensor) -> tuple[Placement, ...]:
    """The placements of `tensor` with every packed cut (a part of each of its halves) made a plain one.

    A packed shard is not one piece of the tensor, so that a checkpoint cannot say where it lies. What FSDP2 makes of a
    dimension that is cut already is: its split factor counts the cuts to its right.
    """
    placements = list(tensor.placements)
    for axis, placement in enumerate(placements):
        if isinstance(placement, StridedShard):
            inner = [
                i for i in range(axis + 1, len(placements)) if getattr(placements[i], "dim", None) == placement.dim
            ]
            if placement.split_factor != math.prod(tensor.device_mesh.size(i) for i in inner):
                placements[axis] = Shard(placement.dim)
    return tuple(placements)


def overlap_matmuls_with_collectives(group: ProcessGroup) -> None:
    """Let inductor fuse matmuls with the gathers and scatters of `group` that they meet."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    torch._inductor.config._micro_pipeline_tp = True


class PipelineStage(TorchPipelineStage):
    """torch's stage, whose first message to its neighbours (torch 2.11) leaves out those on its own rank: gloo cannot
    send to itself, and neighbours on one rank never send (V-shaped schedules)."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def unviewed(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where it is a view of another, which cannot be detached in place."""
    return tensor.clone() if tensor._is_view() else tensor


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
