"""Linear layers that share an input: find them by running the model, and compute them together."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.nn._torch import FakeTensorMode
from automodel_trainer.nn.blocks import find_blocks

Layer = TypeVar("Layer", bound=nn.Linear)


class SharedInput(Generic[Layer]):
    """A group of linear layers that get the same input. Subclasses compute all their outputs at once.

    Args:
        layers: the layers, in the order in which they run.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self._computed: tuple[Tensor, list[Tensor | None]] | None = None

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        """The outputs `[..., out]` of all layers for `x` `[..., in]`, without their biases."""
        raise NotImplementedError

    def output_of(self, layer: Layer, x: Tensor) -> Tensor:
        """The output `[..., out]` of one layer for `x` `[..., in]`. The first layer to ask computes for all."""
        index = self.layers.index(layer)
        # Compute again for a new input, and for a layer that asks twice (a recomputed forward).
        if self._computed is None or self._computed[0] is not x or self._computed[1][index] is None:
            self._computed = (x, list(self.outputs_of(x)))
        outputs = self._computed[1]
        out, outputs[index] = outputs[index], None  # each output is handed out once, so that it can be freed
        if all(output is None for output in outputs):
            self._computed = None
        assert out is not None
        return out if layer.bias is None else out + layer.bias


def layers_with_one_input(model: PreTrainedModel, names: Iterable[str]) -> list[list[str]]:
    """Group the named linear layers by the tensor they get as input.

    To find out, we run a copy of the model once with tensors that have no values, on two tokens.

    Args:
        model: on meta or with real weights, not laid out on a mesh yet.
        names: names of layers that one forward calls once each.

    Returns:
        Groups of one or more names, in the order in which the layers run. Every name is in exactly one group. A layer
        that runs twice or never is alone in its group. If the model cannot run so, every layer is.
    """
    names = list(names)
    if len(names) < 2:
        return [[name] for name in names]  # nothing to group: save the run
    calls = _calls(model, names, torch.device("meta")) or _calls(model, names, FakeTensorMode())
    counts = Counter(name for name, _ in calls)
    groups: dict[int, list[str]] = {}
    for name, given in calls:  # `calls` keeps the tensors alive, so their ids are unique
        if counts[name] == 1:
            groups.setdefault(id(given), []).append(name)
    found = {name for group in groups.values() for name in group}
    return [*groups.values(), *([name] for name in names if name not in found)]


def _calls(
    model: PreTrainedModel, names: Iterable[str], without_values: AbstractContextManager[Any]
) -> list[tuple[str, Tensor]]:
    """The named layers in the order in which they run, each with its input; empty if the model cannot run.

    Args:
        without_values: a context in which tensors have none. On meta a model of 32 blocks runs in a tenth of the time
            that fake tensors take, but more of what models do fails there.
    """
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda module, args: calls.append((name, args[0])) if args else None

    with without_values, torch.no_grad():
        probe = _without_values(model)
        for name in names:
            probe.get_submodule(name).register_forward_pre_hook(note(name))
        tokens = torch.zeros(1, 2, dtype=torch.long)
        # A mask of its own for every query: transformers looks at the values of others.
        given = {"attention_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool)} if tokens.device.type == "meta" else {}
        try:
            probe.set_attn_implementation("eager")  # other kernels would read memory that is not there
            probe(input_ids=tokens, use_cache=False, **given)
        except Exception:  # the model needs other inputs, or reads values: an incomplete record is of no use
            return []
    return calls


def blocks_of(model: nn.Module) -> dict[int, int]:
    """The block index of every module inside a block, keyed by the module's `id`.

    Layers of different blocks must not be computed together, even if they share an input (as in cross-attention):
    blocks are compiled, gathered and run one by one.
    """
    return {id(module): index for index, block in enumerate(find_blocks(model)) for module in block.modules()}


def _without_values(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose tensors have shapes but no values, as the context makes them."""
    memo: dict[int, Any] = {id(t): _empty(t) for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor) -> Tensor:
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype  # some kernels accept bf16 only
    empty = torch.empty(tensor.shape, dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
