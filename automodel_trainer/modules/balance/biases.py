"""Biases of the choice of experts, moved towards an even load (arXiv 2412.19437)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automodel_trainer.models._routers import Router, Routing
from automodel_trainer.modules.balance.losses import real_tokens
from automodel_trainer.strategies import MeshStrategy


class Biases:
    """Counts the choices of an optimizer step, and moves the routers' biases after it.

    Args:
        routers: of this rank.
        rate: how far a step moves a bias.
    """

    def __init__(self, routers: Sequence[Router], rate: float) -> None:
        self.routers, self.rate = routers, rate
        self._chosen: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Begin a step."""
        self._chosen = {}

    def count(self, taken: Sequence[tuple[Router, Routing]], marks: Tensor) -> None:
        """Count the choices of one forward.

        Args:
            marks: int64, see `Documents.marks`.

        Raises:
            ValueError: a router does not return its choices.
        """
        real = real_tokens(marks).to(torch.int64)
        for router, routing in taken:
            chosen = routing.chosen
            if chosen is None:
                raise ValueError(
                    f"balance: bias_rate counts the experts that tokens choose, and the router {router.name} does not "
                    "return them. Set bias_rate=0."
                )
            counts = self._chosen.setdefault(router.name, _zeros(routing.logits))
            counts.scatter_add_(0, chosen.reshape(-1), real.repeat_interleave(chosen.shape[-1]))

    @torch.no_grad()
    def move(self, strategy: MeshStrategy) -> None:
        """After the optimizer step: move each bias by the rate towards an even load. Collective."""
        if not self.rate or not self._chosen:
            return
        names = sorted(self._chosen)
        counts = strategy.sum_over_tokens(torch.stack([self._chosen[name] for name in names])).double()
        self._chosen = {}
        for router in self.routers:
            if router.name in names:
                own = counts[names.index(router.name)]
                bias = router.bias
                assert bias is not None
                bias += self.rate * (own.mean() - own).sign().to(bias.dtype)


def check_biases(model: nn.Module, routers: Sequence[Router], rate: float, adapted: bool) -> None:
    """Check that the biases of all routers can be moved by `rate`.

    Args:
        adapted: whether adapters are trained, whose files hold no bias.

    Raises:
        ValueError: they cannot.
    """
    if not rate:
        return
    if adapted:
        raise ValueError(
            "balance: bias_rate moves the routers' biases, and adapters are saved without them. Set bias_rate=0, or "
            "train the model without lora."
        )
    for router in routers:
        bias = router.bias
        if bias is None:
            raise ValueError(
                f"balance: bias_rate={rate:g} moves a bias of the choice of experts, and the router {router.name} of "
                f"{type(model).__name__} has none. Set bias_rate=0; aux_loss balances any router."
            )
        if isinstance(bias, DTensor) or bias.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"balance: bias_rate needs the biases of the choice of experts whole and in fp32, and those of "
                f"{router.name} are {'sharded' if isinstance(bias, DTensor) else bias.dtype}. Set bias_rate=0."
            )


def _zeros(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
