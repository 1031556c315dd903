"""Generation with a model that FSDP2 shards: its weights are gathered once, and not again for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.strategies.data_parallel.reshard import reshard

_PART_OF_FREE = 0.5  # the rest is left to the cache of keys and values


def gather_once_in_generate(
    model: nn.Module, units: Sequence[nn.Module], group: ProcessGroup, compute: torch.dtype
) -> None:
    """Let `model.generate` keep the units' weights gathered until it ends, if half of the free memory holds them.

    Afterwards every unit is sharded again, so that no later step computes with older weights.

    Args:
        model: sharded by FSDP2. Without a `generate` it stays as it is.
        units: of the model, all sharded over `group`, which free their weights after a forward.
        group: the ranks that gather. All of them generate together.
        compute: the dtype that weights are gathered in.
    """
    if not hasattr(type(model), "generate"):
        return

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        fits = _fits(sum(_gathered_bytes(unit, compute) for unit in units), group)
        with _kept(units if fits else ()):
            try:
                return type(self).generate(self, *args, **kwargs)
            finally:
                reshard(self)

    model.generate = MethodType(generate, model)  # type: ignore[assignment]


@contextmanager
def _kept(units: Sequence[nn.Module]) -> Iterator[None]:
    """A context in which units keep their weights after a forward."""
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)  # type: ignore[operator]


def _gathered_bytes(unit: nn.Module, compute: torch.dtype) -> int:
    """Of this rank's part of the unit, in the dtype that it is gathered in."""
    return sum(local_tensor(p).numel() for p in unit.parameters()) * compute.itemsize


def _fits(size: int, group: ProcessGroup) -> bool:
    """Whether `size` bytes times the ranks of `group` fit on each of them. Collective."""
    device = torch.device("cpu")
    fits = True
    if torch.cuda.is_available() and dist.get_backend(group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        fits = size * group.size() <= free * _PART_OF_FREE
    everywhere = torch.tensor(int(fits), device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=group)
    return bool(everywhere.item())
