"""Linear layers that are given one and the same input: which (what a model does shows it, not its names), and groups
of them that compute together."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from automodel_trainer.nn.blocks import find_blocks

Layer = TypeVar("Layer", bound=nn.Linear)


class SharedInput(Generic[Layer]):
    """Linear layers that get the same input, in the order in which they run."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self._computed: tuple[Tensor, list[Tensor | None]] | None = None

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        """x `[..., in]` -> `[..., out]` of every layer, without their biases."""
        raise NotImplementedError

    def output_of(self, layer: Layer, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`. The first layer of the group that asks computes for all."""
        index = self.layers.index(layer)
        if self._computed is None or self._computed[0] is not x or self._computed[1][index] is None:
            self._computed = (x, list(self.outputs_of(x)))
        outputs = self._computed[1]
        out, outputs[index] = outputs[index], None
        if all(output is None for output in outputs):
            self._computed = None
        assert out is not None
        return out if layer.bias is None else out + layer.bias


def layers_with_one_input(model: PreTrainedModel, names: Iterable[str]) -> list[list[str]]:
    """The named linear layers, those together that get the same tensor, in the order in which they run.

    The model runs once, on two tokens, in a copy that has shapes and no numbers.

    Args:
        model: on meta or real, not laid out yet.
        names: of layers that one forward calls once each.

    Returns:
        groups of one or more names; every name is in one of them. A model that cannot run without numbers, or that
        calls a layer twice or never, has that layer alone.
    """
    names = list(names)
    if len(names) < 2:
        return [[name] for name in names]  # with none, as where all are frozen, there is no need to look
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda module, args: calls.append((name, args[0])) if args else None

    with FakeTensorMode(), torch.no_grad():
        probe = _without_numbers(model)
        for name in names:
            probe.get_submodule(name).register_forward_pre_hook(note(name))
        try:
            probe(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        except Exception:  # it wants other inputs, or looks at numbers: what ran until then is not the whole of it
            calls.clear()
    counts = Counter(name for name, _ in calls)
    groups: dict[int, list[str]] = {}
    for name, given in calls:  # `calls` keeps the tensors, so that no two have one id
        if counts[name] == 1:
            groups.setdefault(id(given), []).append(name)
    found = {name for group in groups.values() for name in group}
    return [*groups.values(), *([name] for name in names if name not in found)]


def blocks_of(model: nn.Module) -> dict[int, int]:
    """Of every module in a block (by its `id`), the block's index.

    Layers of several blocks are compiled, gathered and run apart, also where they look at the same thing, as
    cross-attention does.
    """
    return {id(module): index for index, block in enumerate(find_blocks(model)) for module in block.modules()}


def _without_numbers(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes and no numbers."""
    memo: dict[int, Any] = {id(t): _empty(t) for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor) -> Tensor:
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype  # some kernels take no other
    empty = torch.empty(tensor.shape, dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
