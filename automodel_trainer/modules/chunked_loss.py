"""The next-token loss of a model in a loop of one's own, without all logits at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from automodel_trainer.models.kernels import kernels_in_use
from automodel_trainer.models.kernels.library import LossKernel
from automodel_trainer.models.record import record_of, recorded
from automodel_trainer.modules.loss import next_token_targets, summed_loss
from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.nn.deferred_logits import DeferredLogits, defer_from_now, defer_logits
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
        ValueError: the model's loss is not the next-token loss, or it is computed in a way that does not take
            `num_items_in_batch`; or a kernel library's loss was asked for (`KernelsConfig.loss`), and the head is more
            than a plain linear layer.
    """
    inner = _inside(model)
    _check_next_token(inner, "chunked_loss")
    _let_defer(model)
    called: list[bool] = []

    def loss_function(logits: Tensor | DeferredLogits, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.append(True)
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        return _loss(kernels_in_use(model).loss, logits, labels, *args, **kwargs)

    # The model calls its loss function, and adds what belongs to its loss, such as that of its routers.
    before, inner.loss_function = inner.loss_function, loss_function
    try:
        loss: Tensor = forward_for_loss(
            model, {"use_cache": False, **inputs, "return_dict": True, "input_ids": input_ids, "labels": labels}
        ).loss
    finally:
        inner.loss_function = before
    if not called and num_items_in_batch is not None:
        raise ValueError(
            f"{type(inner).__name__} computes its loss in its own way, which does not take num_items_in_batch. Leave "
            "it out, and scale the loss yourself."
        )
    return loss


def compute_loss_in_chunks(model: PreTrainedModel) -> None:
    """Let `model(input_ids, labels=labels)` compute its loss as `chunked_loss` does, in place.

    The `logits` that it returns with a loss are then `DeferredLogits`: code that uses them gets real ones.

    Raises:
        ValueError: the model's loss is not the next-token loss.
    """
    _check_next_token(model, "kernels loss")
    _let_defer(model)
    model.loss_function = partial(_loss, kernels_in_use(model).loss)
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, with_kwargs=True, always_call=True)


def _inside(model: nn.Module) -> PreTrainedModel:
    """The model itself, or the one that PEFT, DDP or `torch.compile` has wrapped."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"chunked_loss takes a causal language model of transformers, not {type(model).__name__}.")


def _check_next_token(model: PreTrainedModel, asker: str) -> None:
    loss = model.loss_function
    if loss is not ForCausalLMLoss and getattr(loss, "func", None) is not _loss:
        raise ValueError(
            f"{asker} computes the next-token loss, and {type(model).__name__} has another loss. Use "
            "model(input_ids=…, labels=…).loss, with KernelsConfig(loss='auto')."
        )


def _let_defer(model: PreTrainedModel) -> None:
    if recorded(model, DefersLogits) is None:
        defer_logits(model)
        record_of(model).keep(DefersLogits())


def _begin(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        defer_from_now(True)


def _end(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if kwargs.get("labels") is not None:
        defer_from_now(False)


def _loss(
    kernel: LossKernel | None,
    logits: Tensor | DeferredLogits,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The loss, with the arguments of transformers' loss functions."""
    targets = next_token_targets(labels) if shift_labels is None else shift_labels
    targets = targets.to(logits.hidden.device if isinstance(logits, DeferredLogits) else logits.device)
    if ignore_index != IGNORE_INDEX:
        targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
    loss = summed_loss(logits, targets, kernel if isinstance(logits, DeferredLogits) else None)
    count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    return loss / torch.as_tensor(count, device=loss.device).clamp(min=1)
