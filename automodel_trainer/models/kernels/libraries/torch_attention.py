"""Attention kernels of torch: its own choice of one, cuDNN's, and FlashAttention (arXiv 2307.08691)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from automodel_trainer.models.kernels.library import AttentionFunction, KernelLibrary, Offer

_HALF = (torch.bfloat16, torch.float16)


class TorchAttention(KernelLibrary):
    """`sdpa` with one of its kernels.

    Args:
        backend: the kernel; None: torch chooses.
    """

    def __init__(self, name: str, title: str, backend: SDPBackend | None) -> None:
        self.name, self.title, self.backend = name, title, backend
        self.offers = {"attention": Offer(dtypes=() if backend is None else _HALF)}

    def attention(self) -> AttentionFunction:
        backend = self.backend
        if backend is None:
            return sdpa_attention_forward

        def attend(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(backend):
                return sdpa_attention_forward(*args, **kwargs)

        return attend


LIBRARIES = (
    TorchAttention("flex", "sdpa", None),
    TorchAttention("cudnn", "cuDNN", SDPBackend.CUDNN_ATTENTION),
    TorchAttention("flash", "torch's FlashAttention", SDPBackend.FLASH_ATTENTION),
)
