"""The next-token loss of a model in a loop of one's own, without all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from automodel_trainer.models.kernels import kernels_in_use
from automodel_trainer.models.record import record_of, recorded
from automodel_trainer.modules.loss import next_token_targets, summed_loss
from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.nn.deferred_logits import defer_logits
from automodel_trainer.strategies.inner_parallel import forward_for_loss


class DefersLogits:
    """In a model's record: its head can defer its logits."""


def chunked_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **inputs: Any,
) -> Tensor:
    """What `model(input_ids, labels=labels).loss` is, computed a chunk of tokens at a time. 0-dim, fp32 or wider.

    The logits of all tokens never exist at once, in forward or backward. The model may be sharded by a strategy.

    Args:
        model: a causal language model.
        input_ids: int64 `[b, s]`.
        labels: int64 `[b, s]`, aligned with `input_ids` (not shifted); −100 is not trained.
        num_items_in_batch: what the sum of the token losses is divided by; None: the supervised tokens in `labels`.
        inputs: more arguments of the model's forward: `attention_mask`, `position_ids`, …

    Raises:
        ValueError: a kernel library's loss was asked for (`KernelsConfig.loss`), and the head is more than a plain
            linear layer.
    """
    if recorded(model, DefersLogits) is None:
        defer_logits(model)
        record_of(model).keep(DefersLogits())
    outputs = forward_for_loss(model, {"use_cache": False, **inputs, "input_ids": input_ids})
    targets = next_token_targets(labels)
    loss = summed_loss(outputs.logits, targets, kernels_in_use(model).loss)
    count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    return loss / torch.as_tensor(count, device=loss.device).clamp(min=1)
