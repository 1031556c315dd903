"""Where FSDP2 reduces gradients from, against the function of torch that it calls."""

from __future__ import annotations

import pytest
import torch

from automodel_trainer.strategies.data_parallel._fsdp import lay_out_gradients


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
@pytest.mark.parametrize("sizes", [[(16, 3), (32,), (16, 2, 5)], [(5, 3), (1,), (16, 2)]], ids=["even", "uneven"])
def test_as_torch_lays_them_out(sizes: list[tuple[int, ...]], world_size: int) -> None:
    """Cast along, with zeros for what is missing, also of a gradient that is held by columns."""
    gradients = [torch.randn(size).to(torch.bfloat16) for size in sizes]
    gradients.append(torch.randn(6, 32).to(torch.bfloat16).T)
    padded = sum(-(-len(g) // world_size) * world_size * g[0].numel() for g in gradients)
    found, wanted = torch.full((2, padded), torch.nan)
    torch._chunk_cat(gradients, 0, world_size, out=wanted.view(world_size, -1))
    lay_out_gradients(gradients, found, world_size)
    assert torch.equal(found, wanted)
