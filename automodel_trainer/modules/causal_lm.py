"""CausalLMModule: next-token training of a Hugging Face language model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from automodel_trainer.models.kernels import kernels_in_use
from automodel_trainer.models.packed_inputs import document_inputs, lengths_of
from automodel_trainer.modules.hugging_face import HuggingFaceModule
from automodel_trainer.modules.isolation import packs
from automodel_trainer.modules.loss import next_token_targets, summed_loss, supervised_tokens, token_losses
from automodel_trainer.modules.metrics import TokenMetrics
from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.strategies.base.objective import MicroBatch


class CausalLMModule(HuggingFaceModule):
    """Trains a causal language model on next-token prediction.

    The loss is the sum of token losses divided by the supervised tokens of the *global* batch. It takes the arguments
    of `HuggingFaceModule`.
    """

    auto_class = "AutoModelForCausalLM"
    defers_logits = True
    takes_document_lengths = True
    predicts_next_token = True

    def split(self, micro_batch: MicroBatch) -> tuple[dict[str, Any], Tensor]:
        inputs, labels = super().split(micro_batch)
        # Training needs no cache, and with a cache transformers ignores the document boundaries of packed rows.
        inputs["use_cache"] = False
        targets = next_token_targets(labels)
        if self.gives_document_lengths and packs(micro_batch):
            lengths = micro_batch.get("document_lengths") or lengths_of(micro_batch["position_ids"])
            return document_inputs(inputs, lengths), targets.view(1, -1)
        return inputs, targets

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        loss = summed_loss(outputs.logits, targets, kernels_in_use(self.model).loss)
        balance = getattr(outputs, "aux_loss", None)  # mixture-of-experts models with output_router_logits=True
        if balance is not None:
            # The sum is later divided by the tokens of the global batch, so this averages over tokens.
            loss = loss + self.model.config.router_aux_loss_coef * balance * (targets != IGNORE_INDEX).sum()
        return loss

    def count(self, micro_batch: MicroBatch) -> Tensor:
        return supervised_tokens(micro_batch["labels"])

    def build_metrics(self) -> Metric:
        return TokenMetrics()

    def predict(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The log-probability of every supervised token: fp32 `[b, s]`, aligned with `input_ids`, 0 elsewhere."""
        losses = self.per_token(micro_batch, token_losses, torch.float32).view_as(micro_batch["labels"])
        return {"log_probs": F.pad(-losses[:, :-1], (1, 0))}
