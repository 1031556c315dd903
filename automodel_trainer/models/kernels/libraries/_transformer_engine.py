"""Every use of TransformerEngine (2.20.2, `transformer_engine.pytorch`): its modules, run on a model's own parameters.

Its modules keep parameters and scaling state of their own, which would be in a state dict. Here they are made without
parameters, stay outside of the module tree, and are handed the model's weight in every forward.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from automodel_trainer.models.kernels.norm import Norm, NormKernel

RECIPES = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
MULTIPLES = {"delayed": 16, "current": 16, "block": 128}  # of both sides of a weight
_ROWS = {"delayed": 8, "current": 8, "block": 128}  # of the number of tokens


def transformer_engine(option: str) -> Any:
    """`transformer_engine.pytorch`.

    Raises:
        ValueError: it is not installed or does not load; `option` is who asked.
    """
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{option} needs TransformerEngine: pip install 'automodel-trainer[te]', on a machine with CUDA ({error})."
        ) from error
    return te


def check_recipe(name: str) -> None:
    """ValueError where this device cannot compute with an fp8 recipe."""
    te = transformer_engine(f"fp8={name!r} with linear='te'")
    ask = te.is_fp8_block_scaling_available if name == "block" else te.is_fp8_available
    available, reason = ask(return_reason=True)
    if not available:
        raise ValueError(f"fp8={name!r} with linear='te': {reason}. Set fp8 to null.")


def recipe(name: str) -> Any:
    """TransformerEngine's recipe of that name.

    Delayed scaling looks at the largest values that this rank has seen: ranks need not wait for each other.
    """
    transformer_engine(f"fp8={name!r}")
    from transformer_engine.common import recipe as recipes

    options = {"reduce_amax": False} if name == "delayed" else {}
    return getattr(recipes, RECIPES[name])(**options)


def scaled(fp8: Any) -> AbstractContextManager[Any]:
    """A forward in which TransformerEngine's modules multiply in fp8 by a recipe (None: they do not)."""
    te = transformer_engine("linear='te'")
    context: AbstractContextManager[Any] = te.autocast(enabled=fp8 is not None, recipe=fp8)
    return context


class LinearKernel:
    """x · weightᵀ through `te.Linear`.

    Args:
        fp8: name of a recipe, or None.
    """

    def __init__(self, fp8: str | None = None) -> None:
        self.recipe = recipe(fp8) if fp8 else None
        self.rows = _ROWS[fp8] if fp8 else 1
        self.engine: Any = None

    @torch.compiler.disable
    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x `[..., in]`, weight `[out, in]`; out `[..., out]`."""
        if self.engine is None or (self.engine.out_features, self.engine.in_features) != weight.shape:
            self.engine = self._make(weight)
        self.engine._parameters["weight"] = weight
        if self.recipe is None:
            return self.engine(x)  # type: ignore[no-any-return]
        fits = x[..., 0].numel() % self.rows == 0
        if not fits:
            _warn_of_odd_rows(self.rows)
        with scaled(self.recipe if fits else None):
            return self.engine(x)  # type: ignore[no-any-return]

    def _make(self, weight: Tensor) -> Any:
        te = transformer_engine("linear='te'")
        rows, columns = weight.shape
        engine = te.Linear(columns, rows, bias=False, params_dtype=weight.dtype, device="meta")
        # It asks whether FSDP2 holds it, which nobody can tell of a module outside of the tree. Where it does, weights
        # are cast to fp8 anew in backward instead of being kept in fp8 since forward.
        engine._is_fsdp2 = dist.is_initialized() and dist.get_world_size() > 1
        return engine


def norm_kernel(norm: Norm) -> NormKernel | str:
    """A kernel for such norms, or why there is none."""
    te = transformer_engine("norm='te'")
    if norm.offset not in (0.0, 1.0):
        return f"its weight has {norm.offset} added"
    make = te.LayerNorm if norm.centred else te.RMSNorm
    engines: dict[tuple[int, torch.dtype], Any] = {}

    @torch.compiler.disable
    def normed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        key = (weight.numel(), weight.dtype)
        if key not in engines:
            engines[key] = make(
                weight.numel(), eps=norm.eps, device="meta", dtype=weight.dtype, zero_centered_gamma=bool(norm.offset)
            )
        engine = engines[key]
        engine._parameters["weight"] = weight
        if norm.centred:
            engine._parameters["bias"] = torch.zeros_like(weight) if bias is None else bias
        y: Tensor = engine(x)
        return y if norm.centred or bias is None else y + bias

    return normed


@cache
def _warn_of_odd_rows(multiple: int) -> None:
    warnings.warn(
        f"A batch whose tokens are no multiple of {multiple} is not multiplied in fp8. Pack, or pad to a multiple.",
        stacklevel=4,
    )


@cache
def _attention(heads: int, groups: int, size: int, value_size: int, scale: float | None) -> Any:
    te = transformer_engine("attention='te'")
    channels = size if size == value_size else (size, value_size)
    return te.DotProductAttention(
        heads, channels, num_gqa_groups=groups, qkv_format="bshd", attn_mask_type="causal", softmax_scale=scale
    )


@torch.compiler.disable
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention through `te.DotProductAttention`: query `[b, h, s, d]`, key and value `[b, h_kv, s, d]`;
    out `[b, s, h, d]`."""
    attend = _attention(query.shape[1], key.shape[1], query.shape[3], value.shape[3], scale)
    out: Tensor = attend(*(x.transpose(1, 2).contiguous() for x in (query, key, value)))
    return out.unflatten(-1, (query.shape[1], value.shape[3]))
