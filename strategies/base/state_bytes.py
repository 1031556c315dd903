"""How much memory an optimizer's state will take that does not exist before its first step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.nn._torch import FakeTensorMode

MOMENTS = 2  # tensors of a parameter's size that we reckon with if an optimizer cannot be asked


def missing_state_bytes(optimizers: Iterable[Optimizer], device: torch.device) -> int:
    """Bytes of state that the optimizers make in their first step for parameters on `device`.

    An optimizer is asked: a copy of it steps on fake tensors of the same shapes.
    """
    return sum(_missing(optimizer, device.type) for optimizer in optimizers)


def _missing(optimizer: Optimizer, device: str) -> int:
    groups: list[dict[str, Any]] = []
    size = 0
    with FakeTensorMode():
        for group in optimizer.param_groups:
            new = [
                p for p in group["params"] if p.requires_grad and p.device.type == device and not optimizer.state.get(p)
            ]
            locals_ = [local_tensor(p) for p in new]
            size += sum(t.nbytes for t in locals_)
            groups.append({**group, "params": [_fake(t) for t in locals_]})
        made = _state_of_a_step(optimizer, groups)
    return MOMENTS * size if made is None else made


def _fake(tensor: Tensor) -> torch.nn.Parameter:
    fake = torch.nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
    fake.grad = torch.empty_like(fake)
    return fake


def _state_of_a_step(optimizer: Optimizer, groups: list[dict[str, Any]]) -> int | None:
    """Bytes of the state that a copy of the optimizer makes for these groups of fake parameters; None: nobody knows."""
    probe = object.__new__(type(optimizer))
    own = {name: value for name, value in optimizer.__dict__.items() if name != "step" and "hooks" not in name}
    probe.__dict__.update(own, state=defaultdict(dict), param_groups=groups)
    try:
        type(optimizer).step.__wrapped__(probe)  # type: ignore[attr-defined]  # without profiling and hooks
    except Exception:  # whatever a stranger's optimizer does with fake tensors
        if any(p not in probe.state for group in groups for p in group["params"]):
            return None  # else the state was made, and only the kernel is missing
    states = [value for state in probe.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, Tensor) and value.ndim)
