"""Samples of values, for hashes that tell two things in memory apart and cost no time on large ones."""

from __future__ import annotations

import torch
from torch import Tensor

COUNT = 256
"""Values of a tensor, or items of a list."""


def sampled(count: int, most: int = COUNT) -> list[int]:
    """At most `most` places among `count`, evenly spread; the first and the last are among them."""
    if count <= most:
        return list(range(count))
    return [place * (count - 1) // (most - 1) for place in range(most)]


def sample_of(tensor: Tensor, dtype: torch.dtype | None = None) -> bytes:
    """The values at some places of a tensor, as bytes; rounded to `dtype` first if one is given."""
    values = tensor.detach().reshape(-1)
    values = values[torch.tensor(sampled(len(values)), dtype=torch.long, device=values.device)].cpu()
    if dtype is not None and values.is_floating_point():
        values = values.to(dtype)
    wide = torch.view_as_real(values) if values.is_complex() else values
    return wide.to(torch.float64).numpy().tobytes()
