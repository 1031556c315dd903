"""Floating-point operations of towers, counted from what their blocks are called with.

A tower computes patches of pictures, not tokens of text, so its weights do not belong into the FLOPs per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.nn.blocks import find_blocks

_BOUNDARIES = "cu_seqlens"  # transformers' name: where each sequence of a packed input begins, and the end of the last


class TowerWork:
    """Adds up the FLOPs of the forward and backward of towers, from `attach` to `detach`.

    Matmul weights count as in `flops_per_token`, for each row that they multiply. Attention costs `4 · width` per pair
    of patches of one sequence in forward, and twice that in backward if that reaches it. A block
    counts when it is called, so recomputation does not. Nothing waits for the device.

    Args:
        towers: laid out or not; sharded parameters count in full.
        times: what the FLOPs are multiplied with, such as the number of stages of which one has the towers.
    """

    def __init__(self, towers: Sequence[nn.Module], times: int = 1) -> None:
        self.towers, self.times, self.counting = towers, times, True
        self._hooks: list[Any] = []
        self._host, self._device = 0.0, torch.zeros((), dtype=torch.float64)
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def attach(self) -> None:
        """Begin to count."""
        for tower in self.towers:
            self._attach(tower)

    def _attach(self, tower: nn.Module) -> None:
        blocks = find_blocks(tower)
        inside = {id(module) for block in blocks for module in block.modules()}
        for block in blocks:
            if weights := [w for module in block.modules() for w in _weights(module)]:
                self._hooks.append(block.register_forward_pre_hook(partial(self._block, weights), with_kwargs=True))
        for module in tower.modules():
            if id(module) not in inside and (weights := _weights(module)):
                self._hooks.append(module.register_forward_hook(partial(self._alone, weights)))

    def detach(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self) -> Tensor:
        """The FLOPs since the last call, 0-dim float64."""
        total = self.times * (self._device + self._host)
        self._host, self._device, self._pairs = 0.0, torch.zeros((), dtype=torch.float64), {}
        return total

    def _block(self, weights: Sequence[Tensor], block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or not self.counting:
            return
        inputs = weights[0].shape[-1]
        reached = x.requires_grad or any(w.requires_grad for w in weights)
        self._host += _flops(weights, reached) * x.numel() / inputs
        if x.shape[-1] != inputs:  # it joins patches: no attention
            return
        each = 4.0 * inputs * (1 + 2 * reached)
        boundaries = kwargs.get(_BOUNDARIES)
        if isinstance(boundaries, Tensor):
            self._device = self._device.to(x.device) + each * self._pairs_of(boundaries)
        else:
            self._host += each * math.prod(x.shape[:-1]) * x.shape[-2]

    def _pairs_of(self, boundaries: Tensor) -> Tensor:
        known = self._pairs.get(id(boundaries))
        if known is None:
            known = self._pairs[id(boundaries)] = boundaries, boundaries.diff().double().square().sum()
        return known[1]

    def _alone(self, weights: Sequence[Tensor], module: nn.Module, args: Any, output: Any) -> None:
        if self.counting and isinstance(output, Tensor):
            reached = any(isinstance(value, Tensor) and value.requires_grad for value in args)
            self._host += _flops(weights, reached) * output.numel() / len(weights[0])


def _flops(weights: Sequence[Tensor], reached: bool) -> float:
    """Of all matmuls with these weights, for a row of each.

    Args:
        reached: whether the backward needs gradients of the inputs.
    """
    return sum(2.0 * w.numel() * (1 + reached + w.requires_grad) for w in weights)


def _weights(module: nn.Module) -> list[Tensor]:
    """The matmul weight of a module's own; position embeddings and class tokens are parameters under other names."""
    weight = module._parameters.get("weight")
    return [] if weight is None or weight.ndim < 2 or isinstance(module, nn.Embedding) else [weight]
