"""A model with random weights, laid out by the Trainer's strategy, for benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM as Plain
from transformers import PreTrainedConfig

from automodel_trainer import AutoModelForCausalLM, CausalLMModule
from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.nn.deferred_logits import defer_logits


class RandomModel(CausalLMModule):
    """The weights are the same under every layout.

    Args:
        shape: the model's config.
        options: of `CausalLMModule`.
    """

    def __init__(self, shape: PreTrainedConfig, **options: Any) -> None:
        self.shape = shape
        with torch.device("meta"):
            meta = Plain.from_config(shape)
        super().__init__(meta, **options)

    def configure_model(self) -> None:
        if self.model is None:
            options: dict[str, Any] = {"seed": 1, "kernels": self.kernels, "lora": self.lora}
            self.model = AutoModelForCausalLM.from_config(self.shape, self.strategy, **options)
            packing_without_sync(self.model)
            defer_logits(self.model)
            self.model.train()
