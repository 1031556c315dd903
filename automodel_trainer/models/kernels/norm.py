"""Norms that compute with a library's kernel. A norm is recognised by what it computes, not by its name.

RMSNorm, arXiv 1910.07467; LayerNorm, arXiv 1607.06450.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.nn.mixing import mixed
from automodel_trainer.nn.on_cpu import on_cpu

# Rows of two sizes. The results of small rows depend on eps, so they show its value.
_SCALES = (1.0, 1e-3)


@dataclass(frozen=True)
class Norm:
    """What a norm computes over the last dimension of x.

    Args:
        centred: whether the mean is subtracted (LayerNorm) or not (RMSNorm).
        eps: added to the variance.
        offset: added to the weight: 0, or 1 for weights that are stored around zero.
        wide: whether the result is multiplied with the weight before it is cast back, or after.
    """

    centred: bool
    eps: float
    offset: float = 0.0
    wide: bool = False

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In plain torch: `[..., n]` of x `[..., n]`, weight `[n]` and bias `[n]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        if self.centred:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.wide:
            y = y * (weight.to(wide) + self.offset)
            return (y if bias is None else y + bias.to(wide)).to(x.dtype)
        y = y.to(x.dtype) * (weight + self.offset if self.offset else weight)
        return y if bias is None else y + bias


NormKernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class SwappedNorm(nn.Module):
    """A norm that computes with `norm_kernel`; its parameters stay what they are. Mixed in by `swap_norms`."""

    norm_kernel: NormKernel

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_kernel(x, self._parameters["weight"], self._parameters.get("bias"))  # type: ignore[arg-type]


def swap_norms(model: nn.Module, make: Callable[[Norm], NormKernel | str]) -> tuple[list[str], dict[str, str]]:
    """Make the norms of `model` (on meta or real, not laid out yet) compute with a library's kernels, in place.

    Args:
        make: returns a kernel for such norms, or why there is none. A kernel takes x `[..., n]`, weight and bias `[n]`.

    Returns:
        names of the swapped norms; and of those that look like a norm and were not swapped, with the reason.
    """
    swapped: list[str] = []
    left: dict[str, str] = {}
    known: dict[Any, Norm | None] = {}
    for name, module in model.named_modules():
        if not _has_the_shape(module):
            continue
        key = (type(module), module.weight.shape, tuple(sorted(_floats(module).items())))  # type: ignore[union-attr]
        if key not in known:
            known[key] = recognise(module)
        norm = known[key]
        kernel = "not a norm of a known form" if norm is None else make(norm)
        if isinstance(kernel, str):
            left[name] = kernel
            continue
        module.__class__ = mixed(SwappedNorm, type(module))  # type: ignore[arg-type]
        module.norm_kernel = kernel  # type: ignore[assignment]
        swapped.append(name)
    return swapped, left


@on_cpu
def recognise(module: nn.Module) -> Norm | None:
    """The norm that a module computes: the one with the same results on random weights and inputs. None if none has."""
    try:
        probe = copy.deepcopy(module).to_empty(device="cpu").float()
    except (RuntimeError, NotImplementedError):
        return None
    generator = torch.Generator().manual_seed(0)
    size = probe.weight.numel()  # type: ignore[operator, union-attr]
    for parameter in probe.parameters():
        parameter.data.normal_(generator=generator)
    inputs = torch.cat([scale * torch.randn(3, size, generator=generator) for scale in _SCALES]) + 1e-4
    outputs = _outputs(probe, inputs)
    if outputs is None:
        return None
    weight, bias = probe._parameters["weight"], probe._parameters.get("bias")
    assert weight is not None
    for eps in dict.fromkeys(_floats(probe).values()):
        for centred in (False, True):
            for offset in (0.0, 1.0):
                norm = Norm(centred, eps, offset)
                if torch.allclose(norm.reference(inputs, weight, bias), outputs, rtol=1e-4, atol=1e-5):
                    return replace(norm, wide=_is_wide(probe, norm, inputs))
    return None


def _is_wide(probe: nn.Module, norm: Norm, inputs: Tensor) -> bool:
    """Which order of rounding is closer to the module's own results in half precision."""
    half, inputs = probe.bfloat16(), inputs.bfloat16()
    outputs = _outputs(half, inputs)
    if outputs is None:
        return True
    weight, bias = half._parameters["weight"], half._parameters.get("bias")
    assert weight is not None
    error = {
        wide: (replace(norm, wide=wide).reference(inputs, weight, bias).double() - outputs.double()).square().sum()
        for wide in (False, True)
    }
    return bool(error[True] < error[False])


@torch.no_grad()
def _outputs(probe: nn.Module, inputs: Tensor) -> Tensor | None:
    try:
        outputs = probe(inputs)
    except Exception:  # it wants other arguments than a norm
        return None
    return outputs if isinstance(outputs, Tensor) and outputs.shape == inputs.shape else None


def _has_the_shape(module: nn.Module) -> bool:
    """Whether the module has no children, and no parameters but a vector `weight` and perhaps a `bias`."""
    parameters = dict(module.named_parameters(recurse=False))
    return (
        "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(parameter.ndim == 1 for parameter in parameters.values())
        and next(module.children(), None) is None
        and next(module.buffers(), None) is None
    )


def _floats(module: nn.Module) -> dict[str, float]:
    """Attributes that might be eps."""
    return {key: value for key, value in vars(module).items() if isinstance(value, float) and 0 <= value < 1e-2}
