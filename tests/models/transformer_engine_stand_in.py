"""Stands in for `transformer_engine` 2.20.2 where it cannot run: the same names and signatures, in plain torch.

`test_the_stand_in` holds the signatures against the library's own where it is installed. What it refuses (device,
dtypes, tokens in fp8) is refused here too, but for CPU tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3_MAX = 448.0


class _State:
    """Autocast as far as it matters here: what is on, how deep, and how often scales were updated."""

    recipe: Any = None
    depth = 0
    updates = 0


state = _State()


class DelayedScaling:
    def __init__(self, margin: int = 0, reduce_amax: bool = True, amax_history_len: int = 1024) -> None:
        self.reduce_amax = reduce_amax


class Float8CurrentScaling:
    pass


class Float8BlockScaling:
    pass


class autocast:
    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Any = None,
        amax_reduction_group: Any = None,
        _graph: bool = False,
    ) -> None:
        self.recipe = recipe if enabled else None

    def __enter__(self) -> autocast:
        self.before, state.recipe = state.recipe, self.recipe
        state.depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        state.depth -= 1
        state.updates += state.depth == 0 and self.recipe is not None and torch.is_grad_enabled()
        state.recipe = self.before


def _quantized(x: Tensor) -> Tensor:
    scale = E4M3_MAX / x.abs().amax().clamp(min=1e-12)
    rounded = (x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale
    return x + (rounded - x).detach()


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        **_: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.use_bias = bias
        weight = torch.empty(out_features, in_features, device=device, dtype=params_dtype)
        self.register_parameter("weight", nn.Parameter(weight))

    def get_extra_state(self) -> Tensor:  # it must not come into a state dict
        return torch.zeros(1)

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        assert not self.use_bias
        assert inp.shape[-1] == self.in_features
        weight = self.weight
        if not torch.is_autocast_enabled(inp.device.type) and inp.dtype != weight.dtype:
            raise TypeError("Data types for parameters must match when outside of autocasted region.")
        if state.recipe is None:
            return F.linear(inp, weight)
        if math.prod(inp.shape[:-1]) % 8 or inp.shape[-1] % 16:
            raise ValueError("FP8 execution requires …")
        return F.linear(_quantized(inp), _quantized(weight))


class _Norm(nn.Module):
    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert kwargs.keys() <= {"device", "dtype", "sm_margin"}
        self.eps, self.offset = eps, float(zero_centered_gamma)
        self.register_parameter("weight", nn.Parameter(torch.empty(normalized_shape, **kwargs)))  # type: ignore[arg-type]

    def forward(self, input: Tensor, *extra_inputs: Tensor, **kwargs: Any) -> Tensor:
        assert input.shape[-1:] == self.weight.shape
        return self.normalized(input.to(self.weight.dtype))


class RMSNorm(_Norm):
    def normalized(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (self.weight.float() + self.offset)).to(x.dtype)


class LayerNorm(_Norm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_parameter("bias", nn.Parameter(torch.empty_like(self.weight)))

    def normalized(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight + self.offset, self.bias, self.eps)


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        *,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.heads, self.channels, self.groups = num_attention_heads, kv_channels, num_gqa_groups
        self.scale, self.format, self.mask = softmax_scale, qkv_format, attn_mask_type

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, **_: Any) -> Tensor:
        assert (self.format, self.mask) == ("bshd", "causal")
        assert query_layer.shape[2] == self.heads
        assert key_layer.shape[2] == self.groups
        q, k, v = (x.transpose(1, 2) for x in (query_layer, key_layer, value_layer))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def is_fp8_available(return_reason: bool = False) -> Any:
    return (True, "") if return_reason else True


def is_fp8_block_scaling_available(return_reason: bool = False) -> Any:
    return (False, "FP8 block scaled GEMM requires Hopper and CUDA >= 12.9.") if return_reason else False


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import transformer_engine.pytorch` find this."""
    names = ["transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe"]
    modules = {name: ModuleType(name) for name in names}
    modules["transformer_engine.pytorch"] = sys.modules[__name__]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for cls in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling):
        setattr(modules["transformer_engine.common.recipe"], cls.__name__, cls)
    state.recipe, state.depth, state.updates = None, 0, 0
