"""NEFTune: uniform noise on the input embeddings in training (arXiv 2310.05914)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def add_neftune(embedding: nn.Module, alpha: float) -> None:
    """Make `embedding` add uniform noise of up to ±`alpha / sqrt(tokens · width)` to its output in training mode.

    Args:
        embedding: returns `[b, s, h]`; `tokens` is s and `width` is h.
        alpha: strength of the noise (5 in the paper).
    """

    def noisy(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        scale = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + torch.empty_like(output).uniform_(-scale, scale)

    embedding.register_forward_hook(noisy)
