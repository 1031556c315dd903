"""Which kernels a model computes with: chosen by the hardware, each of them switchable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from automodel_trainer.models.attention import NAME as VARLEN
from automodel_trainer.models.attention import install_varlen, varlen_obstacle


@dataclass
class KernelsConfig:
    """The `kernels:` section.

    Args:
        attention: "varlen" (documents of packed rows one by one, FlashAttention; GPU only), any of transformers' names
            (sdpa, eager, flex_attention, flash_attention_2, …), or "auto": varlen on a GPU for a model that it fits,
            else what transformers chooses.
    """

    attention: str = "auto"


def apply_kernels(model: PreTrainedModel, kernels: KernelsConfig, device: torch.device) -> None:
    """Make `model`, not laid out yet, compute with these kernels on `device`.

    Raises:
        ValueError: a kernel that this device or model does not have.
    """
    choice = kernels.attention
    if choice == VARLEN and device.type != "cuda":
        raise ValueError(f"attention='varlen' needs a GPU, and this run is on {device.type}. Leave it at 'auto'.")
    if choice not in ("auto", VARLEN):
        model.set_attn_implementation(choice)
    elif choice == VARLEN or (device.type == "cuda" and varlen_obstacle(model) is None):
        install_varlen(model)
