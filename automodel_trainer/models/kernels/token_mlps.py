"""Finds the MLPs of a model's blocks: modules of linear layers that treat every token by itself.

An MLP is recognised by what it computes, not by its name. A copy with small random layers is run on a few tokens,
together and one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from automodel_trainer.models.kernels.mlp import SwappedMLP
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.nn.on_cpu import on_cpu

_WIDTH, _INNER = 8, 12  # of the small copy that is tested


def find_token_mlps(model: nn.Module, blocks: Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """The MLPs in the blocks of `model` (on meta or real, not cut yet), in model order.

    They take and return hidden states `[…, s, h]`: one layer maps from an inner width back, the others to that width or
    twice that width. Experts that choose their tokens are none.

    Args:
        blocks: where to look; None: all blocks of the model.
    """
    blocks = find_blocks(model) if blocks is None else blocks
    return [module for block in blocks for module in block.modules() if is_token_mlp(module)]


def is_token_mlp(module: nn.Module) -> bool:
    """Whether a module is such an MLP."""
    if isinstance(module, SwappedMLP):  # recognised before, and its kernel may run on a GPU alone
        return True
    layers = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    others = [child for child in module.children() if not isinstance(child, nn.Linear)]
    own = next(module.parameters(recurse=False), None)
    if len(layers) < 2 or own is not None or any(next(child.parameters(), None) is not None for child in others):
        return False
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    return any(_treats_tokens_alone(module, small) for small in _small_sizes(sizes))


def _small_sizes(sizes: dict[str, tuple[int, int]]) -> Iterator[dict[str, tuple[int, int]]]:
    """(in, out) of the layers of the small copy, for every layer that may be the last one of an MLP."""
    for inner, width in sizes.values():
        rest = [size for size in sizes.values() if size != (inner, width)]
        if inner != width and len(rest) == len(sizes) - 1 and set(rest) <= {(width, inner), (width, 2 * inner)}:
            small = {width: _WIDTH, inner: _INNER, 2 * inner: 2 * _INNER}
            yield {name: (small[a], small[b]) for name, (a, b) in sizes.items()}


@on_cpu
@torch.no_grad()
def _treats_tokens_alone(module: nn.Module, sizes: dict[str, tuple[int, int]]) -> bool:
    generator = torch.Generator().manual_seed(0)
    probe = copy.copy(module)
    probe._modules = {name: _in_evaluation(child) for name, child in module._modules.items()}
    for name, (inputs, outputs) in sizes.items():
        layer: nn.Linear = module._modules[name]  # type: ignore[assignment]
        # `skip_init`: the run's random numbers are left alone
        small = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=layer.bias is not None, device="cpu")
        for parameter in small.parameters():
            parameter.normal_(generator=generator)
        probe._modules[name] = small
    probe.training = False
    x = torch.randn(2, 3, _WIDTH, generator=generator)
    try:
        together, alone = probe(x), [probe(x[:, i : i + 1]) for i in range(3)]
    except Exception:  # it wants other arguments
        return False
    fits = isinstance(together, Tensor) and together.shape == x.shape
    return fits and torch.allclose(together, torch.cat(alone, 1), atol=1e-5)


def _in_evaluation(child: nn.Module | None) -> nn.Module | None:
    found = copy.copy(child)
    if found is not None:
        found.training = False
    return found
