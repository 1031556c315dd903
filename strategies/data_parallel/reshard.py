"""Free what FSDP2 has gathered."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def reshard(module: nn.Module) -> None:
    """Free gathered parameters. Training does so in backward, but after an evaluation the root unit holds its own."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
