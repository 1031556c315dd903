"""How routers turn logits into weights, found by running them on random numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from automodel_trainer.models._routers import Router
from automodel_trainer.nn.on_cpu import on_cpu


@on_cpu
@torch.no_grad()
def uses_sigmoid(router: Router) -> bool:
    """Whether the weights of chosen experts go as the sigmoid of their logits; False: as their exponential.

    Raises:
        ValueError: neither, or the router does not return weights and choices.
    """
    module = router.module
    generator = torch.Generator().manual_seed(0)
    tensors = (*module.parameters(), *module.buffers())
    drawn: dict[int, Tensor] = {}
    for t in module.parameters():
        drawn[id(t)] = torch.nn.Parameter(torch.randn(t.shape, generator=generator))
    drawn |= {id(t): torch.zeros(t.shape) for t in module.buffers()}
    probe = copy.deepcopy(module, drawn)
    width = max((t.shape[-1] for t in tensors if t.ndim == 2), default=0)
    probe.records = True
    outputs = type(probe).forward(probe, torch.randn(64, width, generator=generator) * width**-0.5)
    logits, chosen = probe.routing if probe.routing is not None else (None, None)
    found = [o for o in outputs if isinstance(o, Tensor) and chosen is not None and o.shape == chosen.shape]
    weights = next((o for o in found if o.is_floating_point()), None)
    if logits is not None and chosen is not None and weights is not None:
        of_chosen = logits.float().gather(1, chosen)
        for sigmoid in (False, True):
            exact = of_chosen.sigmoid() if sigmoid else of_chosen.exp()
            if torch.allclose(weights / weights.sum(1, keepdim=True), exact / exact.sum(1, keepdim=True), rtol=1e-3):
                return sigmoid
    raise ValueError(
        f"balance: sequence_loss needs routers whose weights go as the softmax or the sigmoid of their logits, and "
        f"{router.name} ({type(module).__mro__[2].__name__}) does something else. Set sequence_loss=0."
    )
