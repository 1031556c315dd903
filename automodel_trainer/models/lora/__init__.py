"""Low-rank adapters (LoRA, DoRA, QLoRA) on a frozen base model, in the format of PEFT."""

from automodel_trainer.models.lora.apply import (
    adapter_names,
    apply_lora,
    describe_lora,
    finish_lora,
    learning_rate_of,
    lora_of,
    starts_without_gradient,
    trained_names,
)
from automodel_trainer.models.lora.config import LoRAConfig
from automodel_trainer.models.lora.embeddings import embeddings_of_adapter, untied_head
from automodel_trainer.models.lora.fuse import fuse_as_chosen
from automodel_trainer.models.lora.layers import adapters

__all__ = [
    "LoRAConfig",
    "adapter_names",
    "adapters",
    "apply_lora",
    "describe_lora",
    "embeddings_of_adapter",
    "finish_lora",
    "fuse_as_chosen",
    "learning_rate_of",
    "lora_of",
    "starts_without_gradient",
    "trained_names",
    "untied_head",
]
