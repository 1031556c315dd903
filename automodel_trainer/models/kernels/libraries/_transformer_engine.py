"""TransformerEngine (2.20.2, `transformer_engine.pytorch`): its modules, run on a model's own parameters.

The modules hold parameters and scaling state of their own, which would show up in a state dict. So they are made
without parameters, are not part of the module tree, and get the model's weight in every forward.

Source: FP8 formats and delayed scaling, arXiv 2209.05433.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from automodel_trainer.models.kernels.library import AttentionFunction, Fp8Recipe, KernelLibrary, Offer
from automodel_trainer.models.kernels.norm import Norm, NormKernel

_RECIPES = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
_ROWS = {"delayed": 8, "current": 8, "block": 128}  # the number of tokens must be a multiple of it


class TransformerEngine(KernelLibrary):
    """NVIDIA's norms, linear layers (bf16 and fp8) and attention. The compiler goes around all of them."""

    name = "te"
    title = "TransformerEngine"
    requirement = "TransformerEngine: pip install 'automodel-trainer[te]', on a machine with CUDA"
    offers = {
        "attention": Offer(dtypes=(torch.bfloat16, torch.float16), cuts_graph=True),
        "norm": Offer(cuts_graph=True),
        "linear": Offer(cuts_graph=True),
    }
    recipes = {"delayed": Fp8Recipe(16, has_history=True), "current": Fp8Recipe(16), "block": Fp8Recipe(128)}

    def load(self) -> Any:
        """`transformer_engine.pytorch`."""
        import transformer_engine.pytorch

        return transformer_engine.pytorch

    def recipe_obstacle(self, recipe: str) -> str | None:
        te = self.load()
        ask = te.is_fp8_block_scaling_available if recipe == "block" else te.is_fp8_available
        available, reason = ask(return_reason=True)
        return None if available else str(reason)

    def norm(self, norm: Norm) -> NormKernel | str:
        if norm.offset not in (0.0, 1.0):
            return f"its weight has {norm.offset} added"
        te = self.load()
        make = te.LayerNorm if norm.centred else te.RMSNorm
        engines: dict[tuple[int, torch.dtype], Any] = {}

        @torch.compiler.disable
        def normed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            key = (weight.numel(), weight.dtype)
            if key not in engines:
                options = {"dtype": weight.dtype, "zero_centered_gamma": bool(norm.offset)}
                engines[key] = make(weight.numel(), eps=norm.eps, device="meta", **options)
            engine = engines[key]
            engine._parameters["weight"] = weight
            if norm.centred:
                engine._parameters["bias"] = torch.zeros_like(weight) if bias is None else bias
            y: Tensor = engine(x)
            return y if norm.centred or bias is None else y + bias

        return normed

    def linear(self, layer: nn.Linear, recipe: str | None) -> Callable[[Tensor, Tensor], Tensor] | str:
        return LinearKernel(recipe)

    def around_forward(self, recipe: str) -> Callable[[], AbstractContextManager[Any]] | None:
        # Delayed scales change when the outermost `autocast` ends, so that has to be around the whole model.
        if not self.recipes[recipe].has_history:
            return None
        scaling = _recipe(recipe)
        return lambda: _scaled(scaling)

    def attention(self) -> AttentionFunction:
        return _attention_forward


TRANSFORMER_ENGINE = TransformerEngine()
LIBRARIES = (TRANSFORMER_ENGINE,)


def _recipe(name: str) -> Any:
    """TransformerEngine's recipe of that name.

    Delayed scaling looks at the largest values that this rank has seen: ranks need not wait for each other.
    """
    TRANSFORMER_ENGINE.load()
    from transformer_engine.common import recipe as recipes

    options = {"reduce_amax": False} if name == "delayed" else {}
    return getattr(recipes, _RECIPES[name])(**options)


def _scaled(fp8: Any) -> AbstractContextManager[Any]:
    """A forward in which TransformerEngine's modules multiply in fp8 by a recipe; None: in the dtype of their input."""
    context: AbstractContextManager[Any] = TRANSFORMER_ENGINE.load().autocast(enabled=fp8 is not None, recipe=fp8)
    return context


class LinearKernel:
    """x · weightᵀ through `te.Linear`.

    Args:
        fp8: name of a recipe, or None.
    """

    def __init__(self, fp8: str | None = None) -> None:
        self.recipe = _recipe(fp8) if fp8 else None
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
        with _scaled(self.recipe if fits else None):
            return self.engine(x)  # type: ignore[no-any-return]

    def _make(self, weight: Tensor) -> Any:
        rows, columns = weight.shape
        options = {"params_dtype": weight.dtype, "device": "meta"}
        engine = TRANSFORMER_ENGINE.load().Linear(columns, rows, bias=False, **options)
        # TransformerEngine looks whether FSDP2 holds the module, and cannot see that of one outside the module tree.
        # If it does, backward casts the weight to fp8 again, and forward need not keep the fp8 copy.
        engine._is_fsdp2 = dist.is_initialized() and dist.get_world_size() > 1
        return engine


@cache
def _warn_of_odd_rows(multiple: int) -> None:
    warnings.warn(
        f"A batch whose tokens are no multiple of {multiple} is not multiplied in fp8. Pack, or pad to a multiple.",
        stacklevel=4,
    )


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """See `KernelLibrary.attention`. What TransformerEngine is not asked for here goes to `sdpa`."""
    if any(kwargs.get(name) for name in ("dropout", "softcap")) or any(
        kwargs.get(name) is not None for name in ("s_aux", "position_bias")
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    return causal_attention(query, key, value, kwargs.get("scaling")), None


@cache
def _engine(heads: int, groups: int, size: int, value_size: int, scale: float | None) -> Any:
    channels = size if size == value_size else (size, value_size)
    return TRANSFORMER_ENGINE.load().DotProductAttention(
        heads, channels, num_gqa_groups=groups, qkv_format="bshd", attn_mask_type="causal", softmax_scale=scale
    )


@torch.compiler.disable
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention through `te.DotProductAttention`: query `[b, h, s, d]`, key and value `[b, h_kv, s, d]`;
    out `[b, s, h, d]`."""
    attend = _engine(query.shape[1], key.shape[1], query.shape[3], value.shape[3], scale)
    out: Tensor = attend(*(x.transpose(1, 2).contiguous() for x in (query, key, value)))
    return out.unflatten(-1, (query.shape[1], value.shape[3]))
