"""Every private torch name for the compiler, its kernels, memory, fake tensors and pytrees (torch 2.11-2.13)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from typing import Any

import torch
import torch._functorch.config
import torch._higher_order_ops.wrap
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

from automodel_trainer.nn.operators import operator

__all__ = [
    "FAST_MATH",
    "DispatchMode",
    "FakeTensorMode",
    "after_backward",
    "allow_side_effects_in_checkpoints",
    "grouped_outer",
    "import_compiler",
    "keep_autograd_functions",
    "prefer_recomputing",
    "pytree",
    "raise_recompile_limit",
    "scaled_grouped_matmul",
    "scaled_matmul",
    "set_allocator",
    "stop_allocating_to",
    "version_of",
    "without_graph_cache",
]

# An option of `torch.compile`'s inductor: use the GPU's fast exp. Its error is at most 2 + 1.2·|x| units in the last
# place of fp32 (CUDA's bound for `__expf`), and results below 2^-126 become zero. The exact version makes the SwiGLU
# and loss kernels compute-bound.
FAST_MATH: dict[str, Any] = {"use_fast_math": True}


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, exact: bool = False
) -> Tensor:
    """Multiply two scaled fp8 matrices: (a · scale_a) @ (b · scale_b).

    We call the private `torch._scaled_mm` because the compiler cannot trace the public
    `torch.nn.functional.scaled_mm`.

    Args:
        a: `[m, k]` fp8, row-major.
        b: `[k, n]` fp8, column-major.
        scale_a, scale_b: fp32 `[m, 1]` and `[1, n]`, or both `[1, 1]`.
        dtype: dtype of the result.
        exact: accumulate in fp32. Otherwise runs of about 128 products are accumulated in fewer bits.

    Returns:
        `[m, n]` in `dtype`.
    """
    if a.is_cuda:
        half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        out = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=half, use_fast_accum=not exact)
    else:  # emulation for devices without fp8 matmuls
        out = (a.float() * scale_a) @ (b.float() * scale_b)
    # Avoid a no-op `out.to(dtype)`: torch 2.11's compiler silently drops the gradient of an autograd.Function that
    # returns its result.
    return out if out.dtype == dtype else out.to(dtype)


def scaled_grouped_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """Multiply rows of a scaled fp8 matrix with the scaled fp8 matrix of their group.

    The product is an operator of its own because the kernel needs these memory layouts, which torch 2.11's compiler
    would not keep.

    Args:
        a: `[s, k]` fp8, row-major, the rows of a group side by side.
        b: `[groups, k, n]` fp8, each column-major.
        scale_a, scale_b: fp32 `[s]` and `[groups, n]`.
        ends: int32 `[groups]`, the end of each group's rows. What follows the last is not written.
        dtype: dtype of the result.

    Returns:
        `[s, n]` in `dtype`.
    """
    out = _scaled_grouped_mm(a, b, scale_a, scale_b, ends)
    return out if out.dtype == dtype else out.to(dtype)


@operator("scaled_grouped_mm")
def _scaled_grouped_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor) -> Tensor:
    assert a.is_contiguous()
    assert b.mT.is_contiguous()
    if a.is_cuda:
        return torch._scaled_grouped_mm(
            a, b, scale_a, scale_b, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    # emulation for devices without fp8 matmuls
    out = a.new_zeros(len(a), b.shape[2], dtype=torch.float32)
    start = 0
    for group, end in enumerate(ends.tolist()):
        rows = a[start:end].float() * scale_a[start:end, None]
        out[start:end] = rows @ (b[group].float() * scale_b[group])
        start = end
    return out


@_scaled_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(len(a), b.shape[2], dtype=torch.bfloat16 if a.is_cuda else torch.float32)


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """aᵀ·b over the rows of each group: a `[s, m]`, b `[s, n]`, ends int32 `[groups]`; `[groups, m, n]`.

    An operator of its own, as `scaled_grouped_matmul`.
    """
    return _grouped_outer(a.contiguous(), b.contiguous(), ends)


@operator("grouped_outer")
def _grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    assert a.is_contiguous()
    assert b.is_contiguous()
    if a.is_cuda:
        return torch._grouped_mm(a.mT, b, offs=ends)
    parts = [0, *ends.tolist()]
    return torch.stack([a[start:end].mT @ b[start:end] for start, end in pairwise(parts)])


@_grouped_outer.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(len(ends), a.shape[1], b.shape[1])


# Whether the compiler overlooks the inside of an autograd.Function in a checkpoint without a policy (torch 2.11). It
# does not mark these operations to be recomputed, and keeps their results for the backward.
CHECKPOINT_MISSES_FUNCTIONS = not hasattr(torch._higher_order_ops.wrap, "_always_prefer_recompute")


def import_compiler() -> None:
    """Do what the first call of a function compiled by the inductor does whatever it compiles.

    It starts the processes that compile kernels (a call that comes before they are there compiles by itself), imports
    the inductor, and hashes the files of torch and triton, half a gigabyte, to tell kept code from that of others.
    Nothing here touches a device: a thread does not know which one is this rank's.
    """
    from torch._inductor import config
    from torch._inductor.async_compile import maybe_warm_pool

    if config.worker_start_method == "subprocess":  # the default: other ways ask a device, or fork this process
        maybe_warm_pool()
    from torch._inductor.codecache import torch_key
    from torch._inductor.codegen.common import init_backend_registration
    from torch._inductor.compile_fx import compile_fx  # noqa: F401
    from torch._inductor.runtime.triton_compat import HAS_TRITON, triton_key

    init_backend_registration()
    torch_key()
    if HAS_TRITON:
        triton_key()


def raise_recompile_limit() -> None:
    """Allow 64 compiled variants of a function. All kinds of blocks share one, and dynamo's default is 8."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def allow_side_effects_in_checkpoints() -> None:
    """Allow Python side effects in code that is both compiled and checkpointed.

    They take effect once, in the forward: the compiled backward is a graph and runs no Python. Tensor parallelism
    needs this because it removes a layer's bias while the layer runs.
    """
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def keep_autograd_functions() -> None:
    """Let torch keep what it traced of graphs with an autograd.Function for later runs, as it does for all others.

    It holds the traced forward and backward, and both are part of its key. torch 2.13 still asks to be told.
    """
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


def prefer_recomputing() -> None:
    """Let compiled backwards recompute cheap tensors (activations, norms) even if a matmul reads them.

    By default these tensors are kept from the forward. In a block with LoRA they are a fifth of the activations,
    because the gradients of the factors read the input of every layer.
    """
    torch._functorch.config.ban_recompute_materialized_backward = False


def stop_allocating_to(graph: torch.cuda.CUDAGraph, device: int) -> None:
    """After a recording that failed: take no more memory from the graph's pool. torch forgets it."""
    with suppress(RuntimeError):  # it did not forget
        torch._C._cuda_endAllocateToPool(device, graph.pool())


def after_backward(call: Callable[[], None]) -> None:
    """Call `call` when the backward that runs now has ended. Call it from a hook."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def set_allocator(settings: str) -> None:
    """Configure the allocator like the environment variable PYTORCH_ALLOC_CONF, but after torch was imported."""
    torch._C._accelerator_setAllocatorSettings(settings)


def without_graph_cache() -> AbstractContextManager[None]:
    """Compile without the on-disk graph cache.

    The cache tells DTensors apart by shape and placement only. It would load the graph of 8-bit optimizer state for
    4-bit state of the same shape, which then fails.
    """
    return torch._functorch.config.patch(enable_autograd_cache=False)


# Operations on lists of tensors, by a few kernels for all of them.
foreach_add_ = torch._foreach_add_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm

# What a subclass of Tensor is made of.
wrapper_subclass = torch.Tensor._make_wrapper_subclass
without_torch_function = torch._C.DisableTorchFunctionSubclass
PIN_MEMORY = torch.ops.aten._pin_memory.default
TO_COPY = torch.ops.aten._to_copy.default
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default

# Attention without a mask, or with one; each returns its result first.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}

# Operations that take longer to recompute than their outputs take to keep: matmuls, attention and, in compiled blocks,
# reductions over ranks.
EXPENSIVE_OPERATIONS = ATTENTION | {
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.automodel_trainer.scaled_grouped_mm.default,
}

# Matrix products -> the place of their second factor `[…, k, n]` among the arguments.
MATMULS = {
    torch.ops.aten.mm.default: 1,
    torch.ops.aten.addmm.default: 2,
    torch.ops.aten.bmm.default: 1,
    torch.ops.aten._scaled_mm.default: 1,
    torch.ops.aten._grouped_mm.default: 1,
    torch.ops.automodel_trainer.scaled_grouped_mm.default: 1,
}


def version_of(tensor: Tensor) -> int | None:
    """How often `tensor` was changed in place. None: a tensor of inference mode, which does not count."""
    return None if tensor.is_inference() else int(tensor._version)


def is_persistent(module: torch.nn.Module, name: str) -> bool:
    """Whether the buffer called `name` of `module` is part of its state dict."""
    return name not in module._non_persistent_buffers_set


def apply_to_tensors(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter, gradient and buffer of `module` by what `change` makes of it, as `module.to` does."""
    module._apply(change)
