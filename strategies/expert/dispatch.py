"""How tokens travel to the ranks of their experts and back, on any backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from automodel_trainer.distributed.phase import during_place
from automodel_trainer.models.kernels.dispatch import Arrived


class _Route(NamedTuple):
    tokens: Tensor  # [sent], the token that each sent row belongs to
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    total: int  # n


class AllToAll:
    """Dispatch by `all_to_all`, on any backend.

    A token is sent once to each rank that holds some of its experts, and the results come back added up: with 8 choices
    over 2 ranks that is at most 2 rows a token in place of 8. No token is dropped. The number of rows is read on the
    host, once per layer and direction. Results do not depend on the order in which messages arrive.

    Args:
        group: the ep ranks.
        local: the number of experts that each of them holds.
    """

    def __init__(self, group: ProcessGroup, local: int) -> None:
        self.group, self.local = group, local

    def dispatch(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Arrived:
        """See `Dispatcher.dispatch`."""
        ranks = self.group.size()
        owners = experts // self.local
        wanted = torch.zeros(ranks, len(hidden), dtype=torch.bool, device=hidden.device)
        wanted.scatter_(0, owners.mT, True)
        choices = owners.new_zeros(ranks).scatter_add_(0, owners.reshape(-1), torch.ones_like(owners).reshape(-1))
        leaving = torch.stack([wanted.sum(1), choices], 1)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        sent, received, chosen_here = torch.stack([leaving[:, 0], *arriving.unbind(1)]).tolist()
        rank, token = wanted.nonzero().unbind(1)  # ordered by rank, then by token
        here = owners[token] == rank[:, None]
        local = torch.where(here, experts[token] % self.local, self.local)
        chosen = (weights[token] * here).to(torch.promote_types(weights.dtype, torch.float32))
        route = _Route(token, sent, received, len(hidden))
        # The numbers of experts are exact in fp32, so they travel with the weights.
        pairs = _AllToAll.apply(torch.cat([chosen, local.to(chosen.dtype)], 1), received, sent, self.group)
        rows = _AllToAll.apply(_Copies.apply(hidden, route), received, sent, self.group)
        arrived, numbers = pairs.split(experts.shape[1], 1)
        return Arrived(rows, numbers.detach().long(), arrived.to(weights.dtype), sum(chosen_here), route)

    def combine(self, output: Tensor, route: _Route) -> Tensor:
        """See `Dispatcher.combine`."""
        return _Sums.apply(_AllToAll.apply(output, route.sent, route.received, self.group), route)


class _AllToAll(Function):
    """Exchange rows: `[sum(leaving), w]` to `[sum(arriving), w]`. The backward is the exchange in reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arriving: list[int], leaving: list[int], group: ProcessGroup) -> Tensor:
        ctx.arriving, ctx.leaving, ctx.group = arriving, leaving, group
        return _exchanged(x, arriving, leaving, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with during_place("exchange of tokens' gradients"):
            return _exchanged(grad, ctx.leaving, ctx.arriving, ctx.group), None, None, None


def _exchanged(x: Tensor, arriving: list[int], leaving: list[int], group: ProcessGroup) -> Tensor:
    received = x.new_empty(sum(arriving), x.shape[1])
    dist.all_to_all_single(received, x.contiguous(), arriving, leaving, group=group)
    return received


class _Copies(Function):
    """Copy each token `[n, h]` once per rank that it is sent to: `[sent, h]`. The backward is `_Sums`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return x[route.tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _summed(grad, ctx.route), None


class _Sums(Function):
    """Add up the rows `[sent, h]` of each token: `[n, h]`. The backward is `_Copies`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return _summed(rows, route)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[ctx.route.tokens], None


def _summed(rows: Tensor, route: _Route) -> Tensor:
    """Add rows to their tokens, in fp32 or wider.

    One rank's rows belong to different tokens, so adding them rank by rank has a fixed order, on a GPU too.
    """
    total = rows.new_zeros(route.total, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for part, tokens in zip(rows.split(route.sent), route.tokens.split(route.sent)):
        total.index_add_(0, tokens, part.to(total.dtype))
    return total.to(rows.dtype)
