"""How much memory an optimizer's state will take that does not exist before its first step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.nn._torch import FakeTensorMode
from automodel_trainer.nn.tensor_bytes import bytes_of

MOMENTS = 2  # tensors of a parameter's size that we reckon with if an optimizer cannot be asked


def missing_state_bytes(optimizers: Iterable[Optimizer], device: torch.device) -> int:
    """Bytes of state that the optimizers make in their first step for parameters on `device`.

    An optimizer is asked: a copy of it steps on tensors of the same shapes that have no memory.
    """
    return sum(_missing(optimizer, device.type) for optimizer in optimizers)


def _missing(optimizer: Optimizer, device: str) -> int:
    missing = 0
    for group in optimizer.param_groups:
        known: dict[tuple[torch.Size, torch.dtype], int] = {}
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.device.type == device and not optimizer.state.get(parameter):
                kind = (local_tensor(parameter).shape, parameter.dtype)
                if kind not in known:
                    known[kind] = _bytes_for(optimizer, group, *kind)
                missing += known[kind]
    return missing


def _bytes_for(optimizer: Optimizer, group: dict[str, Any], shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes of the state that the optimizer makes for a parameter of a group."""
    # Fused optimizers refuse meta. Some with a state in 8 bits read numbers of theirs, which are none in fake tensors.
    for mode, device in ((FakeTensorMode(), "cpu"), (nullcontext(), "meta")):
        with mode, torch.compiler.set_stance("force_eager"):
            found = _asked(optimizer, group, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        if found is not None:
            return found
    return MOMENTS * shape.numel() * dtype.itemsize


def _asked(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> int | None:
    """Bytes of the state that a copy of the optimizer makes for a parameter; None: it makes none on such tensors."""
    parameter.grad = torch.empty_like(parameter)
    probe = object.__new__(type(optimizer))
    own = {name: value for name, value in optimizer.__dict__.items() if name != "step" and "hooks" not in name}
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    probe.__dict__.update(own, state=state, param_groups=[{**group, "params": [parameter]}])
    failed = False
    try:
        type(optimizer).step.__wrapped__(probe)  # type: ignore[attr-defined]  # without profiling and hooks
    except Exception:  # whatever a stranger's optimizer does with such tensors
        failed = True
    made = [value for value in state[parameter].values() if isinstance(value, Tensor) and value.ndim]
    # After an error, a state means that only the kernel is missing.
    return None if failed and not made else sum(map(bytes_of, made))
