"""Which linear layers are given one and the same input: what a model does shows it, not its names."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel


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


def _without_numbers(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes and no numbers."""
    memo: dict[int, Any] = {id(t): _empty(t) for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor) -> Tensor:
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype  # some kernels take no other
    empty = torch.empty(tensor.shape, dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
