"""Activation checkpointing: recompute a block's activations in backward instead of keeping them."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# What is dear to compute and cheap to keep: matmuls and attention. Everything else is recomputed.
_KEEP = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def apply_activation_checkpointing(model: nn.Module, mode: Literal["full", "selective"]) -> None:
    """Checkpoint every block of a transformers model, in place; parameter names do not change.

    Raises:
        ValueError: an unknown mode, or a model that does not support checkpointing.
    """
    if mode not in ("full", "selective"):
        raise ValueError(f"activation_checkpointing={mode!r} is unknown. Allowed: full, selective, or none at all.")
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(model).__name__} does not support activation checkpointing in transformers. "
            "Set activation_checkpointing to null."
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEEP else CheckpointPolicy.PREFER_RECOMPUTE
