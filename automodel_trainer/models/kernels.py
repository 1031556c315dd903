"""Which kernels a model computes with: chosen by the hardware, each of them switchable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from automodel_trainer.models.attention import flex_obstacle, install_flex
from automodel_trainer.models.fp8 import convert_to_fp8

LORA_KERNELS = ("auto", "widened", "separate")


@dataclass
class KernelsConfig:
    """The `kernels:` section.

    Args:
        attention: "flex" (packed rows through FlexAttention, others through sdpa; GPU only), any of transformers' names
            (sdpa, eager, flex_attention, flash_attention_2, …), or "auto": flex on a GPU for a model that it fits, else
            what transformers chooses.
        fp8: linear layers of the blocks multiply in fp8 (NVIDIA GPUs since Ada and Hopper, torchao): "tensorwise"
            (fastest), "rowwise" (more exact) or "rowwise_with_gw_hp" (gradients of weights in bf16). None: they do not.
        lora: "widened" (an adapter's update and its frozen weight in one matmul, see `models/lora/widened.py`),
            "separate", or "auto": widened on a GPU for every layer whose weight lies whole on it.
    """

    attention: str = "auto"
    fp8: str | None = None
    lora: str = "auto"

    def __post_init__(self) -> None:
        if self.lora not in LORA_KERNELS:
            raise ValueError(f"kernels lora={self.lora!r} is unknown. Allowed: {', '.join(LORA_KERNELS)}.")


def apply_kernels(model: PreTrainedModel, kernels: KernelsConfig, device: torch.device) -> None:
    """Make `model`, not laid out yet, compute with these kernels on `device`.

    Raises:
        ValueError: a kernel that this device or model does not have.
    """
    choice, gpu = kernels.attention, device.type == "cuda"
    if choice == "flex" and not gpu:
        raise ValueError(f"attention='flex' needs a GPU, and this run is on {device.type}. Leave it at 'auto'.")
    if choice not in ("auto", "flex"):
        model.set_attn_implementation(choice)
    elif choice == "flex" or (gpu and flex_obstacle(model) is None):
        install_flex(model)
    if kernels.fp8 is not None:
        convert_to_fp8(model, kernels.fp8, device)
    model.lora_kernel = kernels.lora  # type: ignore[assignment]
