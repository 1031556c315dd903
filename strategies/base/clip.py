"""The global gradient norm over any mix of tensors and DTensors, without a host/device sync."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.nn._torch import foreach_mul_, foreach_norm
from automodel_trainer.nn.uneven import holds_nothing

_Group = tuple[DeviceMesh | None, tuple[int, ...]]  # a mesh, and those of its axes that shard
_WHOLE: _Group = (None, ())


@torch.no_grad()
def total_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all gradients: a 0-dim tensor in fp32 (or wider), equal on all ranks. Collective.

    Gradients are grouped by mesh and by the mesh axes that shard them. Local squares are summed within a group, then
    all-reduced over exactly those axes. Any other order would count some gradients twice.
    """
    groups: dict[_Group, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            if type(grad) is Tensor:  # there may be thousands, and calls cost time
                groups[_WHOLE].append(grad)
            else:
                groups[_sharding(grad)].append(local_tensor(grad))
        elif parameter.requires_grad and holds_nothing(parameter):
            # This rank's shard is empty, but other ranks have a part of this gradient. Join their all-reduce.
            groups[_sharding(parameter)].append(local_tensor(parameter))
    squares = [_sum_of_squares(grads, group) for group, grads in groups.items()]
    if not squares:
        return torch.zeros(())
    return torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()


@torch.no_grad()
def clip_grads_(parameters: Iterable[Tensor], max_norm: float, total_norm: Tensor) -> None:
    """Scale all gradients in place by `max_norm / total_norm` if that is below 1, as `torch.nn.utils` does.

    Args:
        parameters: those whose gradients to scale, in any mix of meshes and dtypes.
        max_norm: the largest norm allowed.
        total_norm: the norm of all gradients, 0-dim, from `total_grad_norm`.
    """
    coefficient = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    # `_foreach_mul_` is fast only for tensors of one device and dtype
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = local_tensor(parameter.grad)
            by_kind[grad.device, grad.dtype].append(grad)
    for (device, _), grads in by_kind.items():
        foreach_mul_(grads, coefficient.to(device))


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their L2 norm is at most `max_norm`, for any mix of meshes. Collective.

    torch's function of this name refuses parameters of several meshes, such as split experts. A pipeline's stages are
    not all here: `strategy.clip_grad_norm_` covers those too.

    Args:
        parameters: those whose gradients to scale, or one.
        max_norm: the largest norm allowed; None or 0: only measure.

    Returns:
        the norm before, 0-dim.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = total_grad_norm(parameters)
    if max_norm:
        clip_grads_(parameters, max_norm, norm)
    return norm


def _sharding(grad: Tensor) -> _Group:
    """The mesh of `grad`, and the axes of it that hold different elements on different ranks."""
    if not isinstance(grad, DTensor):
        return _WHOLE
    assert not any(p.is_partial() for p in grad.placements), "a gradient has not been reduced"
    sharded = tuple(axis for axis, p in enumerate(grad.placements) if not isinstance(p, Replicate))
    return grad.device_mesh, sharded


def _sum_of_squares(grads: list[Tensor], group: _Group) -> Tensor:
    """The sum of squares of one group's gradients over all ranks: 0-dim, in fp32 or wider."""
    mesh, axes = group
    held = [grad for grad in grads if grad.numel()] or [grads[0].new_zeros(1)]  # all of a rank's shards can be empty
    dtype = torch.promote_types(held[0].dtype, torch.float32)
    norms = foreach_norm(held, dtype=dtype)
    total = torch.stack(norms).square().sum()
    for axis in axes:  # one axis after another sums over their product
        assert mesh is not None
        dist.all_reduce(total, group=mesh.get_group(axis))
    return total
