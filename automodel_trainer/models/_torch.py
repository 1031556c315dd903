"""Every use of a private torch name in the models (torch 2.11-2.13)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of `torch.compile`'s inductor: exponentials as the GPU has them, off by 2 + 1.2·|x| units in the last place of fp32
# (CUDA's bound for `__expf`), and zero below 2^-126. A library's take more instructions than SwiGLU's and the loss's
# kernels have time for.
FAST_MATH: dict[str, Any] = {"use_fast_math": True}


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, exact: bool = False
) -> Tensor:
    """(a · scale_a) @ (b · scale_b) of fp8 matrices, `[m, n]` in `dtype`.

    `torch.nn.functional.scaled_mm` is the public name, which the compiler cannot look into.

    Args:
        a: `[m, k]`, by rows.
        b: `[k, n]`, by columns.
        scale_a, scale_b: fp32 `[m, 1]` and `[1, n]`, or both `[1, 1]`.
        exact: add up in fp32; else products of some 128 numbers are added up in fewer bits.
    """
    if a.is_cuda:
        half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        out = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=half, use_fast_accum=not exact)
    else:  # what it would be without fp8's units
        out = (a.float() * scale_a) @ (b.float() * scale_b)
    # Not `out.to(dtype)` where that does nothing: an autograd function that returns what comes of it has no gradient
    # when torch 2.11 compiles it, and nobody is told.
    return out if out.dtype == dtype else out.to(dtype)
