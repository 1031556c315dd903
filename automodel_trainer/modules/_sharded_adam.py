"""Adam and AdamW that step on what this rank holds of sharded parameters (`_init_group` of torch 2.11 to 2.13)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from automodel_trainer.distributed._dtensor import local_tensor


def on_shards(cls: type[Optimizer]) -> type[Optimizer]:
    """The class to build in place of torch's `cls`, which computes the same numbers; others are returned as they are.

    Given lists of DTensors, torch looks for one sharding of all of them before the first step, and looks that up before
    each later one. Adam computes number by number, so shards need no agreement.
    """
    return {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW}.get(cls, cls)  # type: ignore[call-overload]


class _OnShards(torch.optim.Adam):
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Append parameters, gradients and state of a group to `lists`, in this order: shards of DTensors."""
        is_complex = super()._init_group(group, *lists)  # type: ignore[misc]
        parameters = list(lists[0])
        if all(_lies_as(tensor, whole) for tensors in lists for tensor, whole in zip(tensors, parameters)):
            for tensors in lists:
                tensors[:] = map(local_tensor, tensors)
        return is_complex


class Adam(_OnShards):
    """`torch.optim.Adam`."""


class AdamW(_OnShards, torch.optim.AdamW):
    """`torch.optim.AdamW`."""


def _lies_as(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a rank's shards of both are of the same numbers; a step count is no DTensor."""
    if isinstance(tensor, DTensor) and isinstance(parameter, DTensor):
        return tensor.placements == parameter.placements and tensor.device_mesh == parameter.device_mesh
    return not isinstance(tensor, DTensor) and (tensor.ndim == 0 or not isinstance(parameter, DTensor))
