"""Per-block compilation: every block of a model runs as one compiled function; blocks of one shape share it.

Compiled is what a block computes, not how it is laid out: FSDP2's hooks and what tensor parallel does at a block's
edges stay outside, activation checkpointing is inside. Only training is compiled: evaluation has other shapes, and
`generate` a new one at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from automodel_trainer.models.lora.fuse import fused_groups
from automodel_trainer.models.lora.fused import FusedGroup, refresh
from automodel_trainer.models.record import CompiledBlock, record_of
from automodel_trainer.nn._torch import (
    FAST_MATH,
    allow_side_effects_in_checkpoints,
    prefer_recomputing,
    raise_recompile_limit,
)
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.nn.wrap import Forward, own_forward


def wants_compile(asked: bool | Literal["auto"], backend: str, device: torch.device) -> bool:
    """Whether to compile on this device.

    Raises:
        ValueError: it was asked for, and cannot be had.
    """
    if asked not in (True, False, "auto"):
        raise ValueError(f"compile={asked!r} is unknown. Allowed: true, false, auto.")
    gpu = device.type == "cuda"
    if asked is True and backend == "inductor" and not gpu:
        raise ValueError(
            f"compile=True makes GPU kernels, and this run is on {device.type}. Leave it at compile='auto', or set "
            "compile_backend='aot_eager' to see whether the model can be compiled at all."
        )
    return asked is True or (asked == "auto" and gpu)


def compile_blocks(
    model: nn.Module,
    backend: str | Callable[..., Any] = "inductor",
    blocks: Sequence[nn.Module] | None = None,
    options: dict[str, Any] | None = None,
) -> int:
    """Compile the training forward of every block of `model`, in place; names and types do not change.

    Call it after activation checkpointing was put on, and before tensor parallel or FSDP2.

    Args:
        backend: of `torch.compile`.
        blocks: those to compile; None: all of the model's.
        options: of `torch.compile`; None: for the inductor `{"use_fast_math": True}`, exponentials as the GPU has them,
            off by 2 + 1.2·|x| units in the last place of fp32 (the loss's are computed so in any case).

    Returns:
        how many blocks there are.

    Raises:
        ValueError: the model has no blocks to compile.
    """
    blocks = find_blocks(model) if blocks is None else blocks
    if not blocks:
        raise ValueError(
            f"compile=True compiles a model block by block, and {type(model).__name__} has no list of blocks "
            "(nn.ModuleList). Set compile=False."
        )
    raise_recompile_limit()
    allow_side_effects_in_checkpoints()
    prefer_recomputing()
    compiled = torch.compile(_run, backend=backend, options=effective_options(backend, options))
    for block in blocks:
        record_of(block).keep(CompiledBlock())
        block.forward = _Compiled(block, own_forward(block), compiled)  # type: ignore[method-assign, assignment]
    return len(blocks)


def effective_options(backend: str | Callable[..., Any], options: dict[str, Any] | None) -> dict[str, Any] | None:
    """What blocks are compiled with where `options` were asked for."""
    return FAST_MATH if options is None and backend == "inductor" else options


def _run(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """One function for all blocks: dynamo compiles it once for each kind of block."""
    return forward(*args, **kwargs)


class _Compiled:
    """A block's forward: compiled in training, as it is in evaluation."""

    def __init__(self, block: nn.Module, forward: Forward, compiled: Callable[..., Any]) -> None:
        self.block, self.forward, self.compiled = block, forward, compiled
        self.fused: list[FusedGroup] | None = None  # not known before the model's weights are real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.block.training:
            return self.forward(*args, **kwargs)
        if self.fused is None:
            self.fused = fused_groups(self.block)
        refresh(self.fused)
        return self.compiled(self.forward, *args, **kwargs)
