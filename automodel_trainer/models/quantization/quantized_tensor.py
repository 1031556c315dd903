"""A frozen weight in NF4 (any shape), fp8 (matrices) or mxfp4 (experts). FSDP2 shards and gathers it in that form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from automodel_trainer.models.quantization import _bitsandbytes, _torchao, fp8_weight, mxfp4
from automodel_trainer.models.quantization.nf4 import QuantizedParts
from automodel_trainer.nn._torch import PIN_MEMORY, TO_COPY, UNSAFE_VIEW, without_torch_function, wrapper_subclass

_NAMES = [field.name for field in fields(QuantizedParts)]
_CUT = ("codes", "scales", "factors")  # these are cut when the weight is; a shard keeps the others whole
_LIBRARIES: dict[str, Any] = {
    "nf4": _torchao,
    "bnb-nf4": _bitsandbytes,
    **dict.fromkeys(fp8_weight.SCHEMES, fp8_weight),
    mxfp4.SCHEME: mxfp4,
}
aten = torch.ops.aten


def quantize(weight: Tensor, scheme: str, scale_block: int) -> QuantizedTensor:
    """Quantize a dense weight of any shape (fp8: `[…, out, in]`).

    Args:
        scheme: see `QuantizedTensor`.
        scale_block: how many scales share a second scale, for NF4.
    """
    if scheme in fp8_weight.SCHEMES:
        return QuantizedTensor(fp8_weight.quantize(weight, scheme), scheme, weight.shape, weight.dtype)
    return QuantizedTensor(_LIBRARIES[scheme].quantize(weight, scale_block), scheme, weight.shape, weight.dtype)


class QuantizedTensor(torch.Tensor):
    """Looks like the dense weight (shape, dtype), and holds `QuantizedParts`.

    torchao's NF4Tensor has at most two dimensions, and a compiled block would keep its dense weight for the backward;
    bitsandbytes' parameter cannot be sharded.

    Args:
        parts: the quantized weight; codes in the row-major order of the weight (mxfp4: of its transpose).
        scheme: `nf4` (torchao's), `bnb-nf4` (bitsandbytes'), `mxfp4`, or one of `fp8_weight.SCHEMES`.
        shape: of the dense weight.
        dtype: that it dequantizes into.
    """

    parts: QuantizedParts
    scheme: str

    @staticmethod
    def __new__(cls, parts: QuantizedParts, scheme: str, shape: Sequence[int], dtype: torch.dtype) -> QuantizedTensor:
        made = wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=parts.codes.device)
        made.parts, made.scheme = parts, scheme
        for name in _NAMES:  # under the names that `__tensor_flatten__` returns
            setattr(made, f"part_{name}", getattr(parts, name))
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedTensor({self.scheme}, shape={list(self.shape)}, dtype={self.dtype})"

    def get_original_weight(self) -> Tensor:
        """The dense weight."""
        return _LIBRARIES[self.scheme].dequantize(self.parts, self.dtype).view(self.shape)

    def get_weight_in_backward(self, gradient: Tensor) -> Tensor:
        """The dense weight for a backward that starts from `gradient`, computed there (`nf4.deferred`)."""
        return _LIBRARIES[self.scheme].dequantize(self.parts, self.dtype, gradient).view(self.shape)

    def remade(self, function: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None) -> QuantizedTensor:
        """A copy with `function` applied to every part."""
        parts = QuantizedParts(**{name: function(getattr(self.parts, name)) for name in _NAMES})
        return QuantizedTensor(parts, self.scheme, self.shape if shape is None else shape, self.dtype)

    def shard(self, index: int, count: int) -> QuantizedTensor:
        """One of `count` equal shards along dimension 0, as a copy."""
        cut = {name: getattr(self.parts, name).chunk(count)[index].clone() for name in _CUT if self._has(name)}
        shape = (self.shape[0] // count, *self.shape[1:])
        return QuantizedTensor(replace(self.parts, **cut), self.scheme, shape, self.dtype)

    def _has(self, name: str) -> bool:
        return getattr(self.parts, name).numel() > 0

    # --- FSDP2's extension for tensors that are gathered as several --------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """Called by FSDP2 before it gathers: the inner tensors of this shard, and what rebuilds the whole from them."""
        names = [name for name in _CUT if self._has(name)]
        shape = (self.shape[0] * mesh.size(), *self.shape[1:])
        return tuple(getattr(self.parts, name) for name in names), (names, shape, self)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole quantized weight. FSDP2 calls it with the gathered inner tensors."""
        if out is not None:  # its parts are views of `outputs`, so they have the new values already
            return None
        names, shape, shard = metadata
        parts = replace(shard.parts, **dict(zip(names, outputs)))
        return QuantizedTensor(parts, shard.scheme, shape, shard.dtype), outputs

    # --- torch's protocols for subclasses ----------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"part_{name}" for name in _NAMES], (self.scheme, self.dtype)

    def _stable_hash_for_caching(self) -> str:
        """The key under which torch (since 2.13) caches compiled code."""
        parts = [getattr(self.parts, name) for name in _NAMES]
        layouts = [(str(p.dtype), tuple(p.shape), p.stride(), p.storage_offset()) for p in parts]
        return repr((self.scheme, str(self.dtype), str(self.device), tuple(self.shape), self.requires_grad, layouts))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> QuantizedTensor:
        scheme, dtype = context
        return QuantizedTensor(QuantizedParts(**{name: inner[f"part_{name}"] for name in _NAMES}), scheme, size, dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with without_torch_function():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _OPS:
            raise NotImplementedError(f"A quantized weight does not support {func}. Call get_original_weight() first.")
        return _OPS[func](func, *args, **(kwargs or {}))


def _same(func: Any, tensor: QuantizedTensor, **_: Any) -> QuantizedTensor:
    return tensor.remade(func)


def _shaped(func: Any, tensor: QuantizedTensor, shape: Sequence[int], *_: Any) -> QuantizedTensor:
    """view and as_strided: the same elements in the same order."""
    shape = [tensor.numel()] if list(shape) == [-1] else shape
    assert math.prod(shape) == tensor.numel(), "a part of a quantized weight cannot be viewed"
    return tensor.remade(aten.detach.default, shape)


def _sliced(
    func: Any, tensor: QuantizedTensor, dim: int = 0, start: int = 0, end: int | None = None
) -> QuantizedTensor:
    assert start in (0, None), "a part of a quantized weight cannot be cut out"
    assert end is None or end >= tensor.shape[dim], "a part of a quantized weight cannot be cut out"
    return tensor.remade(aten.detach.default)


def _moved(func: Any, tensor: QuantizedTensor, **options: Any) -> QuantizedTensor:
    """To another device, or to another dtype to dequantize into."""
    dtype = options.get("dtype") or tensor.dtype
    device, wait = options.get("device"), not options.get("non_blocking", False)
    moved = tensor.remade(lambda part: part.to(device, non_blocking=not wait, copy=True))
    return QuantizedTensor(moved.parts, tensor.scheme, tensor.shape, dtype)


def _pinned(func: Any, tensor: QuantizedTensor, *args: Any, **kwargs: Any) -> bool:
    return all(func(getattr(tensor.parts, name), *args, **kwargs) for name in _CUT if tensor._has(name))


_OPS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    PIN_MEMORY: _same,
    aten.is_pinned.default: _pinned,
    aten.view.default: _shaped,
    UNSAFE_VIEW: _shaped,
    aten.as_strided.default: _shaped,
    aten.slice.Tensor: _sliced,
    TO_COPY: _moved,
}


class _Linear(torch.autograd.Function):
    """x `[..., in]` · Wᵀ; it saves the quantized weight for backward, not the dense one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.get_original_weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.get_weight_in_backward(gradient).to(gradient.dtype), None


def _linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    if weight.scheme in fp8_weight.SCHEMES:
        out = fp8_weight.linear(x, weight.parts, weight.scheme)
    else:
        out = _Linear.apply(x, weight)
    return out if bias is None else out + bias.to(out.dtype)
