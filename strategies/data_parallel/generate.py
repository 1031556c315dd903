"""Generation with a model that FSDP2 shards: its weights are gathered once, and then nothing of FSDP2 runs.

A token of `generate` is little work for a GPU and much for the host. FSDP2's hooks around every block ask what is
gathered, record events and cast all arguments, and ranks ask each other after every token whether one still generates.
Once all weights are in place, neither is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationMixin

from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.models._decode import can_record, recorded_decoding
from automodel_trainer.strategies.data_parallel._fsdp import without_hooks
from automodel_trainer.strategies.data_parallel.reshard import reshard

_PART_OF_FREE = 0.5  # the rest is left to the cache of keys and values


def gather_once_in_generate(
    model: nn.Module,
    group: ProcessGroup,
    compute: torch.dtype,
    *,
    resharding: bool = True,
    independent: bool = True,
) -> None:
    """Let `model.generate` gather all weights once and keep them until it ends, if half of the free memory holds them.

    Afterwards every unit is sharded again, so that no later step computes with older weights.

    Args:
        model: sharded by FSDP2. Without a `generate` it stays as it is.
        group: the ranks that most weights are gathered over. No unit is gathered over more.
        compute: the dtype that weights are gathered in.
        resharding: whether units free their weights after a forward.
        independent: whether a forward of gathered weights needs no other rank. Each then ends when its own answers do,
            and a GPU may replay the steps of an answer whose cache is static.
    """
    own = getattr(type(model), "generate", None)
    if own is None:
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    freeing = [unit for unit in units if unit is not model] if resharding else []
    generating = False
    independent = independent and own is GenerationMixin.generate  # another might not take the arguments below

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal generating
        if generating:  # transformers calls it again for some kinds of generation
            return own(self, *args, **kwargs)
        generating = True
        try:
            fits = _fits(_bytes(self, compute), group)
            if independent and fits and kwargs.get("synced_gpus") is None:
                kwargs["synced_gpus"] = False
            record = independent and fits and _on_gpu(group) and can_record(self)
            if record:
                kwargs.setdefault("disable_compile", True)  # it would compile the steps that are replayed
            with _gathered(self, units, freeing, record) if fits else nullcontext():
                return own(self, *args, **kwargs)
        finally:
            generating = False
            reshard(self)

    model.generate = MethodType(generate, model)  # type: ignore[assignment]


@contextmanager
def _gathered(model: Any, units: Sequence[FSDPModule], freeing: Sequence[FSDPModule], record: bool) -> Iterator[None]:
    """A context in which weights are gathered in the first forward and kept, and later ones run nothing of FSDP2.

    Args:
        model: the outermost unit.
        units: all units, the model too.
        freeing: those that would free their weights after a forward.
        record: whether later forwards may be replayed.
    """
    with _keeping(freeing), ExitStack() as stack:

        def gathered(*_: Any) -> None:
            handle.remove()
            for unit in units:
                unit.unshard()  # of parts that this forward did not need
            stack.enter_context(without_hooks(model))
            if record:
                stack.enter_context(recorded_decoding(model))

        handle = model.register_forward_hook(gathered)
        stack.callback(handle.remove)
        yield


@contextmanager
def _keeping(units: Sequence[FSDPModule]) -> Iterator[None]:
    """A context in which units keep their weights after a forward."""
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)


def _bytes(model: nn.Module, compute: torch.dtype) -> int:
    """Of this rank's part of the model, in the dtype that it is gathered in."""
    return sum(local_tensor(p).numel() for p in model.parameters()) * compute.itemsize


def _fits(size: int, group: ProcessGroup) -> bool:
    """Whether `size` bytes times the ranks of `group` fit on every rank of the job. Collective over all of them."""
    device = torch.device("cpu")
    fits = True
    if _on_gpu(group):
        device = torch.device("cuda", torch.cuda.current_device())
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        fits = size * group.size() <= free * _PART_OF_FREE
    everywhere = torch.tensor(int(fits), device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)  # ranks that need no other rank and ranks that do cannot mix
    return bool(everywhere.item())


def _on_gpu(group: ProcessGroup) -> bool:
    return torch.cuda.is_available() and dist.get_backend(group) == "nccl"
