"""Another processor's rounding, emulated: results of fp32 kernels move by a few units in the last place.

Kernels of different processors sum in different orders and approximate functions differently. `AMT_TEST_ROUNDING=SEED`
(or `SEED:ULPS`, at most so many units, 1 if not given) replaces the CPU kernels that do either by ones which call the
original and then move every number of the result. Where to depends on the seed, the rank, the operator, the shapes and
the number itself. So a process computes the same twice, as a processor does, but other shapes, other ranks and other
seeds round otherwise. Zeros and infinities stay.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VARIABLE = "AMT_TEST_ROUNDING"
KERNELS = (
    # sums of products
    "mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    # sums
    "sum", "sum.dim_IntList", "mean", "mean.dim", "linalg_vector_norm", "native_layer_norm",
    "native_layer_norm_backward", "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data",
    # functions
    "exp", "log", "sin", "cos", "rsqrt", "sigmoid", "tanh", "silu", "silu_backward", "gelu", "gelu_backward",
    "softplus",
)  # fmt: skip
_installed: list[Any] = []


def wanted() -> str:
    """What the environment asks for; empty: nothing."""
    return os.environ.get(VARIABLE, "")


def install() -> None:
    """Replace the kernels in this process, once, if the environment asks for it."""
    if not wanted() or _installed:
        return
    seed, _, ulps = wanted().partition(":")
    library = torch.library.Library("aten", "IMPL")
    _installed.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verrid")
        for name in KERNELS:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, _moved(name, kernel, int(seed), int(ulps or 1)), "CPU", with_keyset=True)


def _moved(name: str, kernel: Any, seed: int, ulps: int) -> Callable[..., Any]:
    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        found = kernel.call_boxed(keys, *args, **kwargs)
        shapes = tuple(a.shape for a in args if isinstance(a, Tensor))
        salt = zlib.crc32(repr((name, seed, os.environ.get("RANK", "0"), shapes)).encode())
        return tuple(move(t, salt, ulps) for t in found) if isinstance(found, tuple) else move(found, salt, ulps)

    return call


def move(value: Any, salt: int, ulps: int = 1) -> Any:
    """Move the numbers of an fp32 tensor in place, each by at most `ulps` units in the last place (of 1)."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    mixed = value.view(torch.int32).bitwise_xor(salt & 0x7FFFFFFF).mul_(0x27D4EB2D)
    mixed = mixed.bitwise_xor_(mixed >> 15).mul_(0x2C1B3C6D) >> 20  # 12 bits with a sign
    return value.mul_((mixed * (ulps * 2.0**-34)).add_(1))
