"""How tokens travel to the ranks of their experts and back: the contract."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Arrived(NamedTuple):
    """The tokens that reached a rank, each of them once, with the choices that fell on this rank's experts.

    Attributes:
        hidden: `[m, h]`.
        experts: `[m, k]` int64, numbers of this rank's experts from 0. A choice of another rank's expert has the number
            of experts of this rank.
        weights: `[m, k]`, the routing weights; 0 for a choice of another rank's expert.
        choices: how many of the `m · k` choices fell on this rank's experts.
        route: what the dispatcher needs to send results back.
    """

    hidden: Tensor
    experts: Tensor
    weights: Tensor
    choices: int
    route: Any


class Dispatcher(Protocol):
    """Sends tokens to experts and results back. Both ways pass gradients, and both are collective over the ep ranks.

    What a rank sends leaves and arrives in a fixed order, so results do not change from run to run.
    """

    def dispatch(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Arrived:
        """Send tokens to the ranks that hold the experts they chose.

        Args:
            hidden: `[n, h]`, this rank's tokens.
            experts: `[n, k]` int64, the experts that every token chose, numbered over all ranks.
            weights: `[n, k]`, the routing weights of these choices.
        """

    def combine(self, output: Tensor, route: Any) -> Tensor:
        """Send the weighted sums `[m, h]` of the arrived tokens back, and add up those of each token: `[n, h]`."""
