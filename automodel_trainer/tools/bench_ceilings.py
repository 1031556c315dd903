"""Measure the best speed of a device for matmul, attention and copy. It takes about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Fast attention kernels. We try which of them the device supports.
_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


class Ceilings(NamedTuple):
    """The best of several tries, with nothing else running."""

    matmul: float  # FLOP/s of a large square matmul
    attention: float  # FLOP/s of causal attention, forward and backward (the backward counts as two forwards)
    copy: float  # bytes read and written per second


class AttentionShape(NamedTuple):
    """Shape of the queries, keys and values of one call: `[batch, heads, length, head_dim]`."""

    batch: int
    heads: int
    length: int
    head_dim: int


def measure_ceilings(device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> Ceilings:
    """Measure a device in the compute dtype of a run and with the shape of the run's attention."""
    return Ceilings(_matmul(device, dtype), _attention(device, dtype, shape), _copy(device))


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def _attention(device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> float:
    q, k, v = (torch.randn(*shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    gradient = torch.randn(*shape, device=device).to(dtype)

    def both_ways() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient)

    keys = (shape.length + 1) / 2  # average number of keys that a token attends to
    flops = 3 * 4 * shape.batch * shape.heads * shape.length * keys * shape.head_dim
    scopes: list[AbstractContextManager[None]] = [nullcontext()]
    if device.type == "cuda":
        scopes += [sdpa_kernel(backend) for backend in _BACKENDS]
    best = float("inf")
    for scope in scopes:
        try:
            with scope:
                best = min(best, _best(both_ways, device))
        except RuntimeError:  # there is no such kernel for this device, dtype or shape
            continue
    return flops / best


def _copy(device: torch.device) -> float:
    count = 2**28 if device.type == "cuda" else 2**25
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _best(lambda: target.copy_(source), device)


def _best(call: Callable[[], object], device: torch.device, seconds: float = 0.3, least: int = 5) -> float:
    """Seconds of the fastest of at least `least` calls, which take at least `seconds` together."""
    call()  # warm up
    best, start, count = float("inf"), time.perf_counter(), 0
    while count < least or time.perf_counter() - start < seconds:
        best = min(best, _timed(call, device))
        count += 1
    return best


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3
