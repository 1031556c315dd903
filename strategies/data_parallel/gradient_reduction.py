"""What FSDP2 makes of the ranks' gradients: sums for an objective, averages for a user's own LightningModule."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def sum_gradients(model: nn.Module) -> None:
    """Sum over ranks, plainly: gloo has no scaled sum, and NCCL's zeroes in bf16 up to torch 2.13 (pytorch#190747)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def average_gradients(model: nn.Module) -> None:
    """FSDP2's default, for what `sum_gradients` was called on."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(None)  # type: ignore[arg-type]


def average_unsharded_gradients(module: nn.Module, world_size: int) -> None:
    """Parameters that stand on a user's LightningModule itself belong to no unit: average their gradients in place.

    Averaging twice changes nothing, so it is right under gradient accumulation too.
    """

    def average(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size

    for parameter in module.parameters():
        if world_size > 1 and parameter.requires_grad and not isinstance(parameter, DTensor):
            with torch.no_grad():
                dist.broadcast(parameter, src=0)
            parameter.register_post_accumulate_grad_hook(average)
