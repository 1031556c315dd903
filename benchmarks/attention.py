"""Measure attention kernels at the shape of llama 8B, forward and backward, on one GPU.

Rows hold one document or several packed ones. TFLOP/s count only attended keys: causal, and within documents.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from automodel_trainer.models.kernels.attention import document_block_mask

# the signature changed after torch 2.11
CAUSAL: dict[str, Any] = {"window_size": (-1, 0)}
if "enable_gqa" in inspect.signature(varlen_attn).parameters:
    CAUSAL["enable_gqa"] = True
ROWS, LENGTH, HEADS, KEY_HEADS, WIDTH = 2, 8192, 32, 8, 128


def timed(run: Callable[[], Any], tensors: list[torch.Tensor]) -> float:
    def once() -> None:
        out = run()
        torch.autograd.grad(out, tensors, torch.randn_like(out))

    for _ in range(5):
        once()
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(3):
            once()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / 3)
    return sorted(times)[4]


def positions(documents_per_row: int) -> np.ndarray:
    lengths = np.full(documents_per_row, LENGTH // documents_per_row)
    return np.tile(np.concatenate([np.arange(n) for n in lengths]), (ROWS, 1))


def main() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.randn(ROWS, HEADS, LENGTH, WIDTH, **options)
    k, v = (torch.randn(ROWS, KEY_HEADS, LENGTH, WIDTH, **options) for _ in range(2))
    flex = torch.compile(flex_attention)
    for documents in (1, 4, 16, 64):
        place = positions(documents)
        starts = np.append(np.flatnonzero(place.reshape(-1) == 0), place.size).astype(np.int32)
        boundaries = torch.from_numpy(starts).cuda()
        number = torch.from_numpy((place == 0).cumsum(1)).cuda()
        keep = number[:, :, None] == number[:, None, :]
        mask = (keep & torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").tril())[:, None]
        block_mask = document_block_mask(number)
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        cases: dict[str, Callable[[], Any]] = {
            "varlen": lambda flat=flat, b=boundaries: varlen_attn(*flat, b, b, LENGTH, LENGTH, **CAUSAL),
            "flex": lambda m=block_mask: flex(q, k, v, block_mask=m, enable_gqa=True),
            "sdpa with a mask": lambda m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True),
        }
        if documents == 1:
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

                def sdpa(backend: SDPBackend = backend) -> torch.Tensor:
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

                cases[str(backend)] = sdpa
            cases["sdpa, its own choice"] = lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
        reference = None
        for name, run in cases.items():
            try:
                seconds = timed(run, [q, k, v])
                out = run()
            except Exception as error:
                print(documents, name, "failed:", str(error)[:300], flush=True)
                continue
            out = out.unflatten(0, (ROWS, LENGTH)).transpose(1, 2) if name == "varlen" else out
            reference = out.detach() if reference is None else reference
            far = float((out.detach() - reference).norm() / reference.norm())
            flops = 3.5 * 4 * ROWS * HEADS * WIDTH * documents * (LENGTH / documents) ** 2 / 2
            print(f"{documents} documents a row, {name}: {seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.0f} TFLOP/s, "
                  f"{far:.1e} from varlen", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
