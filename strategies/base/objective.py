"""Objective: the contract between a training objective and the strategies and tools that run it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from automodel_trainer.nn.constants import IGNORE_INDEX

MicroBatch = dict[str, Any]
"""A batch as the data module yields it: `input_ids` `[b, s]`, `labels` `[b, s]`, … (ARCHITECTURE.md lists the keys)."""
Part = tuple[dict[str, Any], Any]
"""The inputs of a model's forward, and the targets of the loss."""
DEFAULT_INPUTS = ("input_ids", "attention_mask", "position_ids")


class Objective:
    """What is trained: a module that hands a micro-batch to its model and turns the outputs into a summed loss.

    A strategy runs an objective step by step (`forward_backward`). An objective brings `model` and `loss`. All other
    members have a default. `modules.HuggingFaceModule` is the base of an objective over a Hugging Face model: it
    builds the model and has the loop. `docs/add_an_objective.md` writes one out.

    Attributes:
        model: the Hugging Face model; None until it is built.
        auto_class: name of the transformers auto class that builds the model.
        model_inputs: keys of a micro-batch that the model's forward takes, where they are present.
        new_modules: names of the model's modules that a base checkpoint may lack (a classification head). They start
            from random weights, which are the same under every layout.
        targets_per_token: targets are `[b, s]`, one for each token. Then a rank may be given a part of the sequence,
            and the sum of the parts' losses must be the loss of the whole. False refuses context parallel.
        defers_logits: the loss takes `DeferredLogits` (`nn/deferred_logits.py`), which it computes a chunk of tokens at
            a time as `kernels.loss` says. False: the loss gets what the model returned.
        labels_are_tokens: `labels` are token ids, as this project's data modules make them.
        takes_document_lengths: `split` can give the lengths of packed documents to models whose layers want them.
        gives_document_lengths: it does, because this model's layers want them.
        predicts_next_token: a token's target is the next one, so that a model that sees it has nothing to learn.
    """

    model: Any
    auto_class: ClassVar[str]
    model_inputs: ClassVar[tuple[str, ...]] = DEFAULT_INPUTS
    new_modules: ClassVar[tuple[str, ...]] = ()
    targets_per_token: ClassVar[bool] = True
    defers_logits: ClassVar[bool] = False
    labels_are_tokens: ClassVar[bool] = True
    takes_document_lengths: ClassVar[bool] = False
    gives_document_lengths: bool = False
    predicts_next_token: ClassVar[bool] = False

    # --- what a strategy asks in every step -----------------------------------------------------------------------

    def split(self, micro_batch: MicroBatch) -> tuple[dict[str, Any], Any]:
        """The keyword arguments of the model's forward, and the targets of `loss`.

        The default returns the keys in `model_inputs`, and `labels` `[b, s]` unchanged. Positions that restart nowhere
        are left to the model: some families do not count from 0, and without positions attention needs no mask. Those
        with several numbers for each token (`[k, b, s]`) are kept.
        Targets must be aligned with the model's logits: shift them here, before the sequence is split over ranks.
        Context parallel splits every target of shape `[b, s]` and pads it with −100.
        """
        inputs = {key: micro_batch[key] for key in self.model_inputs if micro_batch.get(key) is not None}
        if micro_batch.get("packed") is False and isinstance(p := inputs.get("position_ids"), Tensor) and p.ndim < 3:
            del inputs["position_ids"]
        return inputs, micro_batch["labels"]

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss summed over the targets that are not −100, 0-dim, fp32 or wider.

        It must be a sum, never a mean: the losses of two parts (rows, or halves of a sequence) add up to the loss of
        both, and a part without any target gives 0. `forward_backward` divides by the sum of `count`.

        Args:
            outputs: what the model's forward returned.
            targets: from `split`, or this rank's part of them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss(outputs, targets).")

    def count(self, micro_batch: MicroBatch) -> Tensor:
        """The micro-batch's share of the number that divides the global loss: 0-dim int64, on its device.

        The default counts the labels that are not −100. It counts whole rows: ranks that share a sequence count it
        once.
        """
        count: Tensor = (micro_batch["labels"] != IGNORE_INDEX).sum()
        return count

    def in_step(
        self, strategy: Any, micro_batches: Sequence[MicroBatch], num_tokens: Tensor
    ) -> AbstractContextManager[None]:
        """A context around forward and backward of one optimizer step. It may be collective.

        Args:
            strategy: runs the step.
            micro_batches, num_tokens: see `StepRunner.forward_backward`.
        """
        return nullcontext()

    def token_marks(self, micro_batch: MicroBatch) -> Tensor | None:
        """What `side_loss` needs to know of every token: int64 with the shape of the model's `input_ids`, or None.

        It is split over ranks as targets are, and padded with −100.
        """
        return None

    def side_loss(self, marks: Tensor | None) -> Tensor | None:
        """The part of the loss that layers make beside the logits (routers, say), summed as `loss` is: 0-dim, or None.

        It is asked right after each forward of a training step, in a pipeline after the forward of each stage, on all
        ranks. It may be collective.

        Args:
            marks: this rank's part of `token_marks`.
        """
        return None

    def check_batch(self, batch: Any) -> None:
        """Look at a batch while it is still on the host, where that does not wait for the device.

        Raises:
            ValueError: it cannot be trained on.
        """

    def laid_out(self, strategy: Any) -> None:
        """Called on all ranks before training, when the model is laid out and the optimizers are not made yet."""

    # --- what tools and callbacks ask -----------------------------------------------------------------------------

    @property
    def tokenizer_or_none(self) -> Any:
        """The tokenizer for data modules, preview, export and sample generations; None if there is none."""
        return None

    @property
    def source(self) -> Path | None:
        """The folder that weights and tokenizer come from; None for a model that was built in memory."""
        return None

    @property
    def model_config(self) -> Any:
        """The model's config, available before the model is built; None if it is unknown."""
        return getattr(self.model, "config", None)

    def without_model(self) -> Self:
        """A light copy to send to other processes. It has the loss and settings, but no model, data or Trainer.

        Raises:
            ValueError: this objective cannot be copied.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be copied without its model, as verify needs it. Make it a subclass of "
            "HuggingFaceModule, or give it a without_model()."
        )


def count_all(objective: Objective, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """The sum of `count` over micro-batches, 0-dim int64."""
    return torch.stack([objective.count(micro_batch) for micro_batch in micro_batches]).sum()


class Marked(NamedTuple):
    """The targets of a micro-batch, and the `token_marks` that its `side_loss` asks for."""

    targets: Any
    marks: Tensor


def marked_part(objective: Objective, micro_batch: MicroBatch) -> Part:
    """What `objective.split` gives, with `Marked` targets if the objective has marks."""
    inputs, targets = objective.split(micro_batch)
    marks = objective.token_marks(micro_batch)
    return inputs, targets if marks is None else Marked(targets, marks)


def unmarked(targets: Any) -> tuple[Any, Tensor | None]:
    """The targets and the marks of what `marked_part` gave for targets."""
    return (targets.targets, targets.marks) if isinstance(targets, Marked) else (targets, None)
