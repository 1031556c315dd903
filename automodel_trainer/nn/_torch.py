"""Every private torch name about the compiler, its kernels and memory (torch 2.11-2.13)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._functorch.config
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


def raise_recompile_limit() -> None:
    """Blocks of several kinds share one compiled function: dynamo's 8 variants of it may be too few."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def allow_side_effects_in_checkpoints() -> None:
    """Let compiled code that is checkpointed change Python objects, once: its backward is a graph, and runs no Python.

    Tensor parallel takes a layer's bias away while the layer runs.
    """
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def prefer_recomputing() -> None:
    """Let compiled backwards recompute what is cheap (activations, norms) also where a matmul reads it.

    By default such tensors are kept from the forward. They are a fifth of a block's activations when it is adapted by
    LoRA, whose factors' gradients read every input.
    """
    torch._functorch.config.ban_recompute_materialized_backward = False


def set_allocator(settings: str) -> None:
    """As the environment variable PYTORCH_ALLOC_CONF would, also when torch has begun."""
    torch._C._accelerator_setAllocatorSettings(settings)


def without_graph_cache() -> AbstractContextManager[None]:
    """Compile without looking for the graph on disk, where DTensors are told apart by shape and placement alone.

    Graphs of other packings of the same shape (8-bit and 4-bit optimizer state) are taken for this one's, and fail.
    """
    return torch._functorch.config.patch(enable_autograd_cache=False)
