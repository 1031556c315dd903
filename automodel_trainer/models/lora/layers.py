"""Adapters on a model's own modules: a mixin is added to their class, and parameter names stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from automodel_trainer.models.lora.dropout import dropout
from automodel_trainer.models.lora.functional import adapted_weight, direction_norm, low_rank
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor
from automodel_trainer.nn.mixing import mixed


class Fused(Protocol):
    """A group of layers that compute together, adapters included (`fused.py`)."""

    def takes(self, x: Tensor) -> bool:
        """Whether the group can compute for this input `[..., in]`, here and now."""

    def output_of(self, layer: Any, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]` of one of the layers."""


class LoRALayer(nn.Module):
    """A linear layer with a low-rank update; `weight` and `bias` keep their names. Mixed in by `adapt_linear`."""

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.Linear  # in -> rank
    lora_B: nn.Linear  # rank -> out
    lora_magnitude_vector: nn.Parameter | None  # DoRA: [out]
    scaling: float
    lora_dropout: float
    fused: Fused | None
    compute_dtype: torch.dtype | None = None  # factors are cast to it; None: they compute in their own dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None and self.fused.takes(x):
            return self.fused.output_of(self, x)
        base = super().forward(x)
        if self.lora_magnitude_vector is not None:
            return self._dora(x, base)
        return base + low_rank(self.after_dropout(x), *self.factors(), self.scaling).to(base.dtype)

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as `[out, in]`."""
        return self.weight

    def held_factors(self) -> tuple[Tensor, Tensor]:
        """A `[rank, in]` and B `[out, rank]`."""
        return self.lora_A.weight, self.lora_B.weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B in the dtype that they compute in."""
        a, b = self.held_factors()
        return self._cast(a), self._cast(b)

    def _cast(self, parameter: Tensor) -> Tensor:
        return parameter if self.compute_dtype is None else parameter.to(self.compute_dtype)

    @property
    def drops(self) -> bool:
        """Whether there is dropout on the adapter's input, here and now."""
        return bool(self.lora_dropout) and self.training

    def after_dropout(self, x: Tensor) -> Tensor:
        """The adapter's input, of x `[..., in]`."""
        return dropout(x, self.lora_dropout) if self.drops else x

    def _dora(self, x: Tensor, base: Tensor) -> Tensor:
        """magnitude · (W + s·B·A)·x / ‖W + s·B·A‖, as a change of base `[..., out]`; x is `[..., in]`."""
        assert self.lora_magnitude_vector is not None
        a, b = self.factors()
        weight = dense(self.matrix)
        scale = self._cast(self.lora_magnitude_vector) / direction_norm(weight, a, b, self.scaling)
        if self.drops:
            x = self.after_dropout(x)
            straight = F.linear(x.to(weight.dtype), self.matrix)  # so that backward saves a quantized weight as it is
        else:
            straight = base if self.bias is None else base - self.bias
        change = (scale - 1) * straight + scale * low_rank(x, a, b, self.scaling)
        return base + change.to(base.dtype)


class LoRALinear(LoRALayer, nn.Linear):  # type: ignore[misc]
    """A `nn.Linear` with a low-rank update."""


class LoRAConv1D(LoRALayer, Conv1D):  # type: ignore[misc]
    """transformers' `Conv1D`, a linear layer whose weight is `[in, out]`, with a low-rank update."""

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as `[out, in]`."""
        return self.weight.mT


LINEAR = (nn.Linear, Conv1D)  # the classes of layers that `adapt_linear` takes


class LowRank(nn.Module):
    """The two factors of an adapted parameter. For fused experts each holds the factors of all (`expert_factors`)."""

    def __init__(self, inputs: int, outputs: int, rank: int, experts: int, scaling: float, **factory: Any) -> None:
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank * experts, bias=False, **factory)
        self.lora_B = nn.Linear(rank * experts, outputs, bias=False, **factory)
        self.scaling = scaling


class LoRAParameters(nn.Module):
    """A module some of whose own parameters have a low-rank update. Mixed in by `adapt_parameter`.

    While its forward runs, the parameter's name stands for the updated weight.
    """

    adapted: list[str]

    def low_rank_of(self, name: str) -> LowRank:
        """The factors of the parameter called `name`."""
        return getattr(self, f"lora_{name}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        transposed = bool(getattr(self, "is_transposed", False))
        for name in self.adapted:
            factors = self.low_rank_of(name)
            a, b = factors.lora_A.weight, factors.lora_B.weight
            # Python finds this in `__dict__`, and so never asks `nn.Module.__getattr__` for the parameter.
            base = dense(self._parameters[name])  # type: ignore[arg-type]
            self.__dict__[name] = adapted_weight(base, a, b, factors.scaling, transposed)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in self.adapted:
                del self.__dict__[name]


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model.

    Args:
        target: name of the linear module, or of the parameter.
        module: that holds the adapted weight.
        parameter: the weight's name on `module`.
        a, b: the factors.
        scaling: of B·A.
        prefix: of the factors' names in `module`'s model.
        peft_prefix: of the factors' names in PEFT's format.
    """

    target: str
    module: nn.Module
    parameter: str
    a: nn.Linear
    b: nn.Linear
    scaling: float
    prefix: str
    peft_prefix: str

    @property
    def is_linear(self) -> bool:
        """Whether the adapted weight belongs to a linear layer."""
        return isinstance(self.module, LoRALayer)

    @property
    def is_transposed(self) -> bool:
        """Whether the adapted weight of a linear layer is `[in, out]`."""
        return isinstance(self.module, LoRAConv1D)

    @property
    def has_transposed_experts(self) -> bool:
        """Whether the adapted weight is fused experts `[experts, in, out]`."""
        return not self.is_linear and bool(getattr(self.module, "is_transposed", False))

    @property
    def magnitude(self) -> nn.Parameter | None:
        """The magnitude vector `[out]` of DoRA; None without DoRA."""
        return getattr(self.module, "lora_magnitude_vector", None) if self.is_linear else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters of the adapter."""
        found = (self.a.weight, self.b.weight, self.magnitude)
        return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]

    @property
    def experts(self) -> int:
        """The number of experts that the factors hold; 1 for a plain weight."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight.shape[0] if weight.ndim == 3 else 1

    @property
    def rank(self) -> int:
        """The rank of the update, for one expert."""
        return self.b.weight.shape[1] // self.experts


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """All adapters, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            prefix = f"{name}."
            yield Adapter(name, module, "weight", module.lora_A, module.lora_B, module.scaling, prefix, prefix)
        elif isinstance(module, LoRAParameters):
            for depth, parameter in enumerate(reversed(module.adapted)):
                factors = module.low_rank_of(parameter)
                # PEFT nests one wrapper per parameter around the module, the first parameter's innermost.
                peft_prefix = f"{name}." + "base_layer." * depth
                yield Adapter(
                    f"{name}.{parameter}", module, parameter, factors.lora_A, factors.lora_B, factors.scaling,
                    f"{name}.lora_{parameter}.", peft_prefix,
                )  # fmt: skip


def let_adapters_cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Let adapters compute in `dtype`, whatever dtype they are held in. For layouts that do not cast them."""
    for module in model.modules():
        if isinstance(module, LoRALayer):  # an adapted parameter always computes in its own dtype
            module.compute_dtype = dtype


def adapt_linear(
    module: nn.Linear | Conv1D, rank: int, scaling: float, *, dropout: float, dora: bool, dtype: torch.dtype
) -> None:
    """Give a linear layer an adapter, in place and on its device."""
    factory: dict[str, Any] = {"device": module.weight.device, "dtype": dtype}
    mixin, shape = LoRALinear, module.weight.shape
    if isinstance(module, Conv1D):
        mixin, shape = LoRAConv1D, shape[::-1]  # type: ignore[assignment]
    outputs, inputs = shape
    module.__class__ = mixed(mixin, type(module))  # type: ignore[assignment, arg-type]
    assert isinstance(module, LoRALayer)
    module.lora_A = nn.Linear(inputs, rank, bias=False, **factory)
    module.lora_B = nn.Linear(rank, outputs, bias=False, **factory)
    magnitude = nn.Parameter(torch.empty(outputs, **factory)) if dora else None
    module.register_parameter("lora_magnitude_vector", magnitude)
    module.scaling, module.lora_dropout, module.fused = scaling, dropout, None


def adapt_parameter(module: nn.Module, name: str, rank: int, scaling: float, *, dtype: torch.dtype) -> None:
    """Give a module's own 2-D or 3-D parameter an adapter, in place and on its device."""
    weight = module._parameters[name]
    assert weight is not None
    experts = weight.shape[0] if weight.ndim == 3 else 1
    outputs, inputs = weight.shape[-2:]
    if weight.ndim == 3 and getattr(module, "is_transposed", False):
        outputs, inputs = inputs, outputs
    if not isinstance(module, LoRAParameters):
        module.__class__ = mixed(LoRAParameters, type(module))  # type: ignore[arg-type]
        module.adapted = []  # type: ignore[assignment]
    assert isinstance(module, LoRAParameters)
    factors = LowRank(inputs, outputs, rank, experts, scaling, device=weight.device, dtype=dtype)
    module.add_module(f"lora_{name}", factors)
    own = list(module._parameters)
    module.adapted = sorted([*module.adapted, name], key=own.index)


def dense(weight: Tensor) -> Tensor:
    """The weight as a dense tensor of the same shape."""
    return weight.get_original_weight() if isinstance(weight, QuantizedTensor) else weight


def quantizable_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The adapted weights that can be quantized: of linear layers and of fused experts.

    A single matrix outside a linear layer (a router, say) is small and stays as it is.

    Returns:
        name of a module -> names of its parameters.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[name] = ("weight",)
        elif isinstance(module, LoRAParameters):
            stacked = tuple(key for key in module.adapted if module._parameters[key].ndim == 3)  # type: ignore[union-attr]
            found |= {name: stacked} if stacked else {}
    return found
