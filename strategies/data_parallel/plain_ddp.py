"""Averages the gradients of a replicated model in a loop that knows nothing of ranks.

DDP wraps the model, and a loop that was given the model itself would call it without a word to DDP. So the model
carries this until a Trainer wraps it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from automodel_trainer.nn._torch import after_backward

_BUCKET = 64 * 2**20  # bytes that one all-reduce takes


class AverageAfterBackward:
    """At the end of every backward, averages all gradients of `model` over the ranks of the world.

    Averaging what was averaged before changes nothing, so gradients may accumulate over several backwards. A parameter
    that some ranks did not use counts as zero there; one that no rank used stays without a gradient.

    Args:
        model: the same on every rank. Each rank must call backward equally often.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._waiting = False
        self._forward = model.register_forward_pre_hook(self._watch)

    def remove(self) -> None:
        """Leave the gradients alone from now on."""
        self._forward.remove()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def _watch(self, *_: Any) -> None:
        """Before a forward: also watch parameters that have been unfrozen since the last one."""
        if torch.is_grad_enabled():
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter not in self._hooks:
                    self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._one_is_there)

    def _one_is_there(self, _: Tensor) -> None:
        if not self._waiting:
            self._waiting = True
            after_backward(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._waiting = False
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        for parameter, some_rank in zip(parameters, used.tolist()):
            if some_rank and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                grad.copy_(part.view_as(grad))


def _buckets(grads: list[Tensor]) -> list[list[Tensor]]:
    """Lists of gradients of one dtype and at most `_BUCKET` bytes (or one gradient) each."""
    found: list[list[Tensor]] = []
    size = 0
    for grad in grads:
        if not found or found[-1][0].dtype != grad.dtype or size + grad.nbytes > _BUCKET:
            found.append([])
            size = 0
        found[-1].append(grad)
        size += grad.nbytes
    return found
