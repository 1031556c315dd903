"""The next-token loss, the only place that turns logits into a loss.

Logits are a tensor `[b, s, v]`, a DTensor sharded over v, or `DeferredLogits`, which are computed chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from automodel_trainer.models.kernels.library import LossKernel
from automodel_trainer.modules.linear_cross_entropy import Groups, chunk_rows, linear_cross_entropy
from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.nn.deferred_logits import DeferredLogits
from automodel_trainer.strategies.tensor.loss_parallel import sharded_argmax, sharded_logits, sharded_token_losses

Logits = Tensor | DeferredLogits


def next_token_targets(labels: Tensor) -> Tensor:
    """Targets aligned with the logits that predict them.

    Args:
        labels: int64 `[b, s]`, aligned with the input as Hugging Face has it.

    Returns:
        int64 `[b, s]`: position i holds the label of token i + 1; the last position is not trained.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_tokens(labels: Tensor) -> Tensor:
    """The number of supervised tokens in `labels` `[b, s]`, 0-dim int64. Nothing predicts column 0."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def summed_loss(
    logits: Logits, targets: Tensor, kernel: LossKernel | None = None, groups: Groups | None = None
) -> Tensor:
    """The sum of `token_losses`, 0-dim.

    Args:
        logits: of `[b, s, v]`.
        targets: `[b, s]`, from `next_token_targets`.
        kernel: a kernel library's loss, for `DeferredLogits`; None uses `linear_cross_entropy.py`.
        groups: where the losses are also added up; not with a kernel library's loss, which gives their sum alone.

    Raises:
        ValueError: a kernel library's loss was asked for, and the head is more than a plain linear layer.
    """
    if isinstance(logits, DeferredLogits) and (weight := logits.plain_weight) is not None:
        bias: Any = getattr(logits.layer, "bias", None)
        hidden, wanted = logits.hidden.flatten(0, -2), targets.flatten()
        if kernel is not None:
            return kernel.function(hidden, weight, bias, wanted)
        return linear_cross_entropy(hidden, weight, bias, wanted, groups)
    if kernel is not None:
        raise ValueError(
            f"kernels loss={kernel.name!r} needs a head that is a plain linear layer. This one is cut over ranks, "
            "adapted, or followed by a scale or a cap. Use 'chunked'."
        )
    losses = token_losses(logits, targets)
    if groups is not None:
        groups.add(losses)
    return losses.sum()


def token_losses(logits: Logits, targets: Tensor) -> Tensor:
    """Cross-entropy per token, in fp32 or wider. Tokens without a label have 0.

    Args:
        logits: of `[b, s, v]`.
        targets: `[b, s]`, from `next_token_targets`.

    Returns:
        `[b·s]`.
    """
    if isinstance(logits, DeferredLogits):
        return torch.cat(list(_by_chunks(logits, targets, _token_losses)))
    return _token_losses(logits, targets)


def losses_and_predictions(logits: Logits, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses` `[b·s]` and the most likely token of every position, int64 `[b·s]`. Without gradients."""

    def both(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([_token_losses(logits, targets).double(), predictions(logits).flatten().double()])

    with torch.no_grad():
        parts = _by_chunks(logits, targets, both) if isinstance(logits, DeferredLogits) else [both(logits, targets)]
        losses, likeliest = torch.cat(list(parts), dim=1)
    return losses, likeliest.long()


def _by_chunks(logits: DeferredLogits, targets: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
    """Apply `of` to the logits and targets of one chunk of tokens after another. Backward recomputes the logits."""
    hidden = logits.hidden.flatten(0, -2)[None]  # a head that is cut over ranks takes [b, s, h]
    rows = chunk_rows(logits.vocabulary, hidden.device)

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        with sharded_logits():
            return of(logits.of(hidden), targets)

    for part, wanted in zip(hidden.split(rows, dim=1), targets.reshape(1, -1).split(rows, dim=1)):
        yield checkpoint(chunk, part, wanted, use_reentrant=False)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    if isinstance(logits, DTensor):
        return sharded_token_losses(logits, targets, IGNORE_INDEX)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.flatten(0, 1).to(dtype)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")


def predictions(logits: Logits) -> Tensor:
    """The most likely token of every position, int64 `[b, s]`. Logits are `[b, s, v]`, perhaps sharded over v."""
    return sharded_argmax(logits) if isinstance(logits, DTensor) else logits.argmax(-1)
