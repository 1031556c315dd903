"""Next-token loss: the one place where logits become a number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from automodel_trainer.strategies.loss_parallel import sharded_argmax, sharded_token_losses

IGNORE_INDEX = -100


def next_token_targets(labels: Tensor) -> Tensor:
    """Targets aligned with the logits that predict them.

    Args:
        labels: int64 `[b, s]`, aligned with the input as Hugging Face has it.

    Returns:
        int64 `[b, s]`: position i holds the label of token i + 1; the last position is not trained.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_tokens(labels: Tensor) -> Tensor:
    """How many tokens of `labels` `[b, s]` are predicted, 0-dim int64: one in column 0 has nothing before it."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per token, 0 where not trained, in fp32 or wider.

    Args:
        logits: `[b, s, v]`; a DTensor sharded over v stays so.
        targets: `[b, s]`, from `next_token_targets`.

    Returns:
        `[b·s]`.
    """
    if isinstance(logits, DTensor):
        return sharded_token_losses(logits, targets, IGNORE_INDEX)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.flatten(0, 1).to(dtype)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")


def predictions(logits: Tensor) -> Tensor:
    """The most likely token of every position, int64 `[b, s]`, of logits `[b, s, v]` (a DTensor sharded over v too)."""
    return sharded_argmax(logits) if isinstance(logits, DTensor) else logits.argmax(-1)
