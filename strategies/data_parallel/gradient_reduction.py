"""How gradients are averaged over ranks, where that is not FSDP2's own average."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def average_over(modules: Iterable[nn.Module], ranks: int) -> None:
    """Make FSDP2 divide the summed gradients of these units by `ranks`.

    Experts need it: they are sharded over fewer ranks than the rows are, and see the tokens of all of them. It is a
    plain sum, divided afterwards by a hook. gloo has no scaled sum, and NCCL's gives zeros in bf16 up to torch 2.13
    (pytorch#190747). FSDP2's own factor is applied twice where a single rank holds the unit (torch 2.13).
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_all_reduce_hook(partial(_divide, by=ranks))


def _divide(gradients: Tensor, by: int) -> None:
    gradients /= by


def average_unsharded_gradients(module: nn.Module, world_size: int) -> None:
    """Average the gradients of parameters that belong to no FSDP2 unit, by a hook on each.

    Those are parameters of a user's LightningModule itself, not of its parts. They are also made equal on all ranks
    here. A hook averages the accumulated gradient after every backward. That is right under gradient accumulation too,
    because averaging the part that is equal on all ranks already does not change it.

    Args:
        world_size: the number of ranks; with 1 nothing happens.
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
