"""Cross-entropy on logits that stay sharded over the vocabulary: no rank ever holds a whole row of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

_sharded = False  # a plain global, not a context variable: on CUDA, backward may recompute in other threads


@contextmanager
def sharded_logits() -> Iterator[None]:
    """A context in which a tensor-parallel head returns its logits as a DTensor sharded over the vocabulary.

    Outside of it the head gathers them, for callers that do not expect a DTensor (`generate`, a user's own loss).
    """
    global _sharded
    before, _sharded = _sharded, True
    try:
        yield
    finally:
        _sharded = before


def keeps_logits_sharded() -> bool:
    """Whether we are inside `sharded_logits`."""
    return _sharded


def sharded_token_losses(logits: DTensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Cross-entropy per token in fp32 or wider, equal on all ranks. Collective.

    Args:
        logits: `[b, s, v]`, sharded over v.
        targets: int64 `[b, s]`, equal on all ranks.
        ignore_index: the target of tokens that are not trained; their loss is 0.

    Returns:
        `[b·s]`.
    """
    local, group, start = _shard(logits)
    return _CrossEntropy.apply(local.flatten(0, -2), targets.flatten(), ignore_index, start, group)


@torch.no_grad()
def sharded_argmax(logits: DTensor) -> Tensor:
    """The index of the largest logit over the whole vocabulary, int64 `[b, s]` for logits `[b, s, v]`. Collective."""
    local, group, start = _shard(logits)
    if not local.shape[-1]:  # this rank has no part of the vocabulary; `max` needs one element
        local = local.new_full((*local.shape[:-1], 1), float("-inf"))
    value, index = local.max(-1)
    values, indices = (_stack_over(group, part) for part in (value, index + start))
    return indices.gather(0, values.argmax(0, keepdim=True))[0]


def _shard(logits: DTensor) -> tuple[Tensor, ProcessGroup, int]:
    """This rank's logits `[b, s, v_local]`, the group they are sharded over, and the vocabulary index of the first."""
    (placement,) = logits.placements
    assert placement.is_shard(logits.ndim - 1), "logits must be sharded over the vocabulary"
    mesh = logits.device_mesh
    step = -(-logits.shape[-1] // mesh.size())
    return logits.to_local(), mesh.get_group(), min(mesh.get_local_rank() * step, logits.shape[-1])


def _stack_over(group: ProcessGroup, part: Tensor) -> Tensor:
    """Gather the ranks' `[…]` into `[ranks, …]`."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)


class _CrossEntropy(Function):
    """Cross-entropy of `[n, v_local]` logits and `[n]` targets.

    It needs two all-reduces, of one and two elements per token. Backward keeps the logits in their own dtype and a few
    elements per token.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, start: int, group: ProcessGroup
    ) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(-1) if wide.shape[-1] else wide.new_full(wide.shape[:1], float("-inf"))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        # Only the rank that holds a token's target adds its logit; the others add 0.
        index = targets - start
        mine = (index >= 0) & (index < logits.shape[-1])
        index = index.masked_fill(~mine, 0)
        at_target = wide.gather(-1, index[:, None])[:, 0] if wide.shape[-1] else torch.zeros_like(largest)
        sums = torch.stack(
            [(wide - largest[:, None]).exp().sum(-1), torch.where(mine, at_target, torch.zeros_like(at_target))]
        )
        dist.all_reduce(sums, group=group)
        log_sum = largest + sums[0].log()
        trained = targets != ignore_index
        ctx.save_for_backward(logits, log_sum, index, mine, trained)
        return torch.where(trained, log_sum - sums[1], torch.zeros_like(log_sum))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, log_sum, index, mine, trained = ctx.saved_tensors
        # The gradient of cross-entropy is softmax − one-hot(target). Each rank computes its own columns.
        probability = (logits.to(log_sum.dtype) - log_sum[:, None]).exp_()
        if logits.shape[-1]:
            probability.scatter_add_(-1, index[:, None], -mine[:, None].to(probability.dtype))
        return (probability * (grad * trained)[:, None]).to(logits.dtype), None, None, None, None
