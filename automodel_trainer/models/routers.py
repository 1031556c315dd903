"""How routers turn logits into weights, found by running them on random numbers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from automodel_trainer.models._routers import RecordingRouter, Router
from automodel_trainer.nn.on_cpu import on_cpu

_TOKENS = 64


class Probe(NamedTuple):
    """What a router with random weights gave for random tokens.

    Attributes:
        logits: `[n, experts]`, as it records them.
        chosen: int64 `[n, k]`; None: it does not return them.
        weights: `[n, k]` of the chosen; None: it does not return them.
    """

    logits: Tensor
    chosen: Tensor | None
    weights: Tensor | None

    @property
    def records_probabilities(self) -> bool:
        """Whether what is recorded adds up to 1, so that it is no logits."""
        return bool((self.logits >= 0).all() and torch.allclose(total := self.logits.sum(-1), torch.ones_like(total)))


def probes(routers: list[Router]) -> dict[str, Probe]:
    """A probe of each router, by its name. Routers of one class are alike. Those that cannot be run are left out."""
    found: dict[type, Probe | None] = {}
    for router in routers:
        if type(router.module) not in found:
            found[type(router.module)] = _probe(router)
    every = {router.name: found[type(router.module)] for router in routers}
    return {name: probe for name, probe in every.items() if probe is not None}


@on_cpu
@torch.no_grad()
def _probe(router: Router) -> Probe | None:
    """A copy of the router with random weights is given random tokens. None: it cannot be run."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[int, Any] = {id(t): torch.zeros(t.shape) for t in router.module.buffers()}
    for parameter in router.module.parameters():
        drawn[id(parameter)] = nn.Parameter(torch.randn(parameter.shape, generator=generator))
    module = copy.deepcopy(router.module, drawn)
    module.records = True
    for tokens in _tokens(module, generator):
        try:
            outputs = type(module).forward(module, tokens, **_handed_over(module, router.bias))
        except Exception:  # it takes tokens of another width or shape
            continue
        if module.routing is not None:
            return _found(module, outputs)
    return None


def _tokens(module: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
    """Random tokens of every width that the router may take, as rows and as a batch of one."""
    widths = {p.shape[-1] for p in module.parameters() if p.ndim == 2}
    for width in sorted(widths, reverse=True):
        tokens = torch.randn(_TOKENS, width, generator=generator) * width**-0.5
        yield from (tokens, tokens[None])


def _handed_over(module: nn.Module, bias: Tensor | None) -> dict[str, Tensor]:
    """Zeros for a bias that the router takes as its second argument."""
    taken = list(inspect.signature(type(module).__mro__[2].forward).parameters.values())[2:3]  # type: ignore[attr-defined]
    return {p.name: torch.zeros(bias.shape) for p in taken if bias is not None and p.name.endswith("bias")}


def _found(module: RecordingRouter, outputs: Any) -> Probe:
    assert module.routing is not None
    logits, chosen = module.routing
    if chosen is not None and (chosen.ndim != 2 or len(chosen) != len(logits)):
        chosen = None  # tokens in the order of their experts, say
    shape = None if chosen is None else chosen.shape
    found = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point() and o.shape == shape]
    return Probe(logits.float(), chosen, next(iter(found), None))


def uses_sigmoid(router: Router, probe: Probe | None) -> bool:
    """Whether the weights of chosen experts go as the sigmoid of their logits; False: as their exponential.

    Raises:
        ValueError: neither, or the router does not return weights and choices, or it could not be probed.
    """
    if probe is not None and probe.chosen is not None and probe.weights is not None:
        weights, of_chosen = probe.weights.float(), probe.logits.gather(1, probe.chosen)
        for sigmoid in (False, True):
            exact = of_chosen.sigmoid() if sigmoid else of_chosen.exp()
            if torch.allclose(weights / weights.sum(1, keepdim=True), exact / exact.sum(1, keepdim=True), rtol=1e-3):
                return sigmoid
    raise ValueError(
        f"balance: sequence_loss needs routers whose weights go as the softmax or the sigmoid of their logits, and "
        f"{router.name} ({type(router.module).__mro__[2].__name__}) does something else. Set sequence_loss=0."
    )
