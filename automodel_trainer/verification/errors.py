"""Relative errors of a layout's tensors, against those that one device wrote to a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# As a part of the norm of all gradients. A gradient that is zero but for rounding has a meaningless relative error, so
# no gradient is divided by less than this.
_FLOOR = 1e-4


class KeptTensors:
    """Tensors by name. Each is read from the file when it is asked for.

    Args:
        file: an open safetensors file.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.names: list[str] = sorted(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, by their names without it."""
        return {name.removeprefix(prefix): self[name] for name in self.names if name.startswith(prefix)}


@contextmanager
def kept_tensors(folder: Path) -> Iterator[KeptTensors]:
    """The tensors that the run on one device wrote to `folder`."""
    with safe_open(folder / "reference.safetensors", framework="pt") as file:
        yield KeptTensors(file)


def scalar_error(value: Tensor, reference: Tensor) -> float:
    """The relative error of a 0-dim tensor."""
    return abs(float(value) - float(reference)) / max(abs(float(reference)), 1e-12)


def gradient_errors(values: dict[str, Tensor], expected: dict[str, Tensor], total: float) -> dict[str, float]:
    """The relative error of every gradient; see `_errors`. `total` is the norm of all of `expected`."""
    return _errors(values, expected, lambda _: _FLOOR * total)


def weight_errors(values: dict[str, Tensor], expected: dict[str, Tensor], lr: float) -> dict[str, float]:
    """The relative error of every weight; see `_errors`. `lr` is how far a step moves an entry at most.

    A bias that starts at zero and has no gradient but rounding (that of keys: softmax takes no notice of it) is
    rounding itself. So no weight is divided by less than a full step.
    """
    return _errors(values, expected, lambda weight: lr * math.sqrt(weight.numel()))


def _errors(
    values: dict[str, Tensor], expected: dict[str, Tensor], floor: Callable[[Tensor], float]
) -> dict[str, float]:
    """The relative error of every tensor, in the order of the model. It is infinite where only one of the two has it.

    Args:
        values: of the layout, by name.
        expected: of one device, by name.
        floor: the smallest number to divide by, of an expected tensor.
    """
    errors = {
        name: relative_error(value, expected[name], floor(expected[name])) if name in expected else math.inf
        for name, value in values.items()
    }
    return errors | {name: math.inf for name in expected if name not in values}


def relative_error(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """‖value − reference‖ / ‖reference‖, in fp64. It is infinite if shapes differ or a number is not finite.

    Args:
        value, reference: of any shape.
        floor: the smallest number to divide by.
    """
    if value.shape != reference.shape:
        return math.inf
    error = float((value.double() - reference.double()).norm() / max(float(reference.double().norm()), floor, 1e-12))
    return error if math.isfinite(error) else math.inf


def common_scale(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float | None:
    """The factor c with value ≈ c · expected (to 1e-3) for all tensors at once. None if there is no such c."""
    if values.keys() != expected.keys() or any(values[n].shape != expected[n].shape for n in values):
        return None
    value = torch.cat([v.flatten() for v in values.values()]).double()
    reference = torch.cat([expected[name].flatten() for name in values]).double()
    scale = float(value @ reference / (reference @ reference).clamp(min=1e-30))
    return scale if relative_error(value, scale * reference) < 1e-3 else None
