"""Gated MLPs (GLU variants, arXiv 2002.05202) that compute act(gate) · up with a library's kernel.

An MLP is recognised by what it computes, not by its name: down(act(gate(x)) · up(x)), with three linear layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automodel_trainer.nn.mixing import mixed
from automodel_trainer.nn.on_cpu import on_cpu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
GateKernel = Callable[[Tensor, Tensor], Tensor]
_WIDTH, _INNER = 8, 12  # of the small copy that is tested


@dataclass(frozen=True)
class GatedMLP:
    """What an MLP computes: down(activation(gate(x)) · up(x)).

    Args:
        activation: a key of `ACTIVATIONS`.
        gate, up, down: names of the linear layers.
    """

    activation: str
    gate: str
    up: str
    down: str


class SwappedMLP(nn.Module):
    """A gated MLP that computes act(gate) · up with `gate_kernel`. Mixed in by `swap_gated_mlps`."""

    gate_kernel: GateKernel
    roles: GatedMLP

    def forward(self, x: Tensor) -> Tensor:
        roles, layers = self.roles, self._modules
        inner = self.gate_kernel(layers[roles.gate](x), layers[roles.up](x))  # type: ignore[misc]
        return layers[roles.down](inner)  # type: ignore[misc, no-any-return]


def swap_gated_mlps(model: nn.Module, make: Callable[[GatedMLP], GateKernel | str]) -> tuple[list[str], dict[str, str]]:
    """Make the gated MLPs of `model` (on meta or real, not laid out yet) compute with a library's kernels, in place.

    Args:
        make: returns a kernel of gate and up `[..., n]`, or why there is none.

    Returns:
        names of the swapped MLPs; and of those that look like one and were not swapped, with the reason.
    """
    swapped: list[str] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if len(_linear(module)) != 3 or isinstance(module, SwappedMLP):
            continue
        roles = recognise(module)
        kernel = "not a gated MLP of a known form" if roles is None else make(roles)
        if isinstance(kernel, str):
            left[name] = kernel
            continue
        module.__class__ = mixed(SwappedMLP, type(module))  # type: ignore[arg-type]
        module.gate_kernel, module.roles = kernel, roles  # type: ignore[assignment]
        swapped.append(name)
    return swapped, left


def recognise(module: nn.Module) -> GatedMLP | None:
    """Find which layer is which, by running a copy with small random layers. None if it computes something else."""
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in _linear(module).items()}
    if len(sizes) != 3 or any(_matters(child) for child in _others(module)):
        return None
    for gate, up, down in permutations(sizes):
        if sizes[gate] == sizes[up] == sizes[down][::-1]:
            for activation in ACTIVATIONS:
                roles = GatedMLP(activation, gate, up, down)
                if _is(module, roles):
                    return roles
    return None


@on_cpu
@torch.no_grad()
def _is(module: nn.Module, roles: GatedMLP) -> bool:
    generator = torch.Generator().manual_seed(0)
    probe = _small_copy(module, roles, generator)
    x = torch.randn(1, 3, _WIDTH, generator=generator)
    layers: dict[str, Any] = dict(probe.named_children())
    wanted = layers[roles.down](ACTIVATIONS[roles.activation](layers[roles.gate](x)) * layers[roles.up](x))
    try:
        found = probe(x)
    except Exception:  # it wants other arguments than a gated MLP
        return False
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)


def _small_copy(module: nn.Module, roles: GatedMLP, generator: torch.Generator) -> nn.Module:
    probe = copy.copy(module)
    probe._modules = dict(module._modules)
    for name, layer in _linear(module).items():
        sizes = (_INNER, _WIDTH) if name == roles.down else (_WIDTH, _INNER)
        # `skip_init`: the run's random numbers are left alone
        small = nn.utils.skip_init(nn.Linear, *sizes, bias=layer.bias is not None, device="cpu")
        for parameter in small.parameters():
            parameter.normal_(generator=generator)
        probe._modules[name] = small
    probe.training = True  # so that a dropout of its own shows
    return probe


def _linear(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}


def _others(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if not isinstance(child, nn.Linear)]


def _matters(module: nn.Module) -> bool:
    """Whether the module has parameters or dropout, which a kernel would leave out."""
    drops = any(isinstance(part, nn.Dropout) and part.p for part in module.modules())
    return drops or next(module.parameters(), None) is not None
