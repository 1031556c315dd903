"""Which kernels a model computes with: chosen by the hardware, each of them switchable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.models.kernels.attention import KERNELS, flex_obstacle, install_attention_kernel
from automodel_trainer.models.kernels.fp8 import RECIPES, convert_to_fp8
from automodel_trainer.models.kernels.libraries import _liger, _transformer_engine
from automodel_trainer.models.kernels.linear import convert_to_te
from automodel_trainer.models.kernels.mlp import swap_gated_mlps
from automodel_trainer.models.kernels.norm import swap_norms
from automodel_trainer.models.kernels.rope import restore_rope, swap_rope
from automodel_trainer.models.lora.layers import adapters
from automodel_trainer.nn.shared_input import layers_with_one_input

# What "auto" is on a GPU: what benchmarks/kernels.py measures to be fastest (see benchmarks/RESULTS.md).
FASTEST = {
    "attention": "flex",
    "loss": "chunked",
    "norm": "compile",
    "activation": "compile",
    "rope": "compile",
    "linear": "torch",
}
CHOICES = {
    "loss": ("auto", "chunked", "whole", "liger"),
    "norm": ("auto", "compile", "liger", "te"),
    "activation": ("auto", "compile", "liger"),
    "rope": ("auto", "compile", "liger"),
    "linear": ("auto", "torch", "te"),
    "lora": ("auto", "widened", "separate"),
}


@dataclass
class KernelsConfig:
    """The `kernels:` section; docs/kernels.md has each choice, when it is refused, and what "auto" is.

    Args:
        attention: "flex" (packed rows through FlexAttention, others through the kernel that torch chooses), "cudnn",
            "flash" or "te" (others through cuDNN, FlashAttention or TransformerEngine); GPU only. Or any of
            transformers' names (sdpa, eager, flex_attention, flash_attention_2, …). "auto": flex on a GPU for a model
            that it fits, else what transformers chooses.
        loss: "chunked" (logits of a chunk of tokens at a time), "whole" (all logits at once) or "liger".
        norm: "compile" (the model's own, compiled with its block), "liger" or "te".
        activation: of gated MLPs, together with the product: "compile" or "liger".
        rope: rotary position embedding: "compile" or "liger".
        linear: of the blocks: "torch" or "te" (TransformerEngine).
        fp8: linear layers of the blocks multiply in fp8 (NVIDIA GPUs since Ada and Hopper). By torchao: "tensorwise"
            (fastest), "rowwise" (more exact) or "rowwise_with_gw_hp" (gradients of weights in bf16); with linear="te":
            "delayed" (fastest), "current" or "block". None: they do not.
        fp8_all_gather: with fp8="tensorwise", FSDP2 casts trained weights before it gathers them: half the traffic, and
            no rank casts a whole weight. "auto": where it shards over several ranks, and neither tp nor cpu_offload
            stands in the way; True: that, or an error; False: weights are gathered as they compute, and cast then.
        lora: "widened" (the updates and frozen weights of layers that share an input in one matmul, see
            `models/lora/fused.py`; compiled blocks only), "separate", or "auto": widened on a GPU for every layer
            whose weight lies whole on it.

    Raises:
        ValueError: an unknown choice.
    """

    attention: str = "auto"
    loss: str = "auto"
    norm: str = "auto"
    activation: str = "auto"
    rope: str = "auto"
    linear: str = "auto"
    fp8: str | None = None
    fp8_all_gather: bool | Literal["auto"] = "auto"
    lora: str = "auto"

    def __post_init__(self) -> None:
        if self.fp8_all_gather not in (True, False, "auto"):
            raise ValueError(f"kernels fp8_all_gather={self.fp8_all_gather!r} is unknown. Allowed: true, false, auto.")
        if self.fp8_all_gather is True and self.fp8 not in RECIPES:
            raise ValueError(
                f"kernels fp8_all_gather=true gathers the weights that torchao's fp8='tensorwise' casts, and "
                f"fp8={self.fp8!r}. Set fp8='tensorwise', or leave fp8_all_gather at 'auto'."
            )
        for name, allowed in CHOICES.items():
            if (chosen := getattr(self, name)) not in allowed:
                raise ValueError(f"kernels {name}={chosen!r} is unknown. Allowed: {', '.join(allowed)}.")

    def on(self, device: torch.device) -> KernelsConfig:
        """The same with a choice in place of every "auto" but attention's, which depends on the model."""
        plain = {"loss": "chunked", "norm": "compile", "activation": "compile", "rope": "compile", "linear": "torch"}
        best = FASTEST if device.type == "cuda" else plain
        chosen: dict[str, Any] = {name: best[name] for name in plain if getattr(self, name) == "auto"}
        return replace(self, **chosen)


def apply_kernels(model: PreTrainedModel, kernels: KernelsConfig, device: torch.device) -> None:
    """Make `model`, not laid out yet, compute with these kernels on `device`.

    Raises:
        ValueError: a kernel that this device or model does not have.
    """
    chosen = kernels.on(device)
    _refuse_without_gpu(chosen, device)
    _choose_attention(model, kernels.attention, device)
    used = {"loss": _loss(chosen.loss)}
    for name, swap in _SWAPS.items():
        choice = getattr(chosen, name)
        try:
            used[name] = swap(model, choice, device)
        except ValueError:
            if getattr(kernels, name) != "auto":
                raise
            used[name] = swap(model, "compile", device)
    used["linear"] = _choose_linear(model, chosen, device)
    model.kernels_in_use = used  # type: ignore[assignment]
    model.lora_kernel = kernels.lora, _lora_groups(model, kernels.lora, device)  # type: ignore[assignment]


def _lora_groups(model: PreTrainedModel, choice: str, device: torch.device) -> list[list[str]] | None:
    """Adapted layers that share an input, if anybody will ask."""
    if choice == "separate" or (choice == "auto" and device.type != "cuda"):
        return None
    return layers_with_one_input(model, (adapter.target for adapter in adapters(model) if adapter.is_linear))


def kernels_in_use(model: nn.Module) -> dict[str, str]:
    """For the ledger: what of `model` computes with what, but for attention and fp8."""
    found: Any = getattr(model, "kernels_in_use", None)
    return dict(found) if isinstance(found, dict) else {}


def check_compiled(kernels: KernelsConfig, compiles: bool) -> None:
    """ValueError for a choice of "compile" in a run that does not compile its blocks."""
    asked = [name for name in _SWAPS if getattr(kernels, name) == "compile"]
    asked += ["lora"] if kernels.lora == "widened" else []
    if asked and not compiles:
        raise ValueError(
            f"kernels {asked[0]}={getattr(kernels, asked[0])!r} needs compiled blocks, and this run does not compile "
            "them (compile=False, or no GPU). Leave it at 'auto'."
        )


def _refuse_without_gpu(kernels: KernelsConfig, device: torch.device) -> None:
    if device.type == "cuda":
        return
    for name in ("attention", *CHOICES):
        choice = getattr(kernels, name)
        if choice in ("liger", "te") or (name == "attention" and choice in KERNELS):
            raise ValueError(f"{name}={choice!r} needs a GPU, and this run is on {device.type}. Leave it at 'auto'.")


def _choose_attention(model: PreTrainedModel, choice: str, device: torch.device) -> None:
    if choice in KERNELS:
        install_attention_kernel(model, choice)
    elif choice != "auto":
        model.set_attn_implementation(choice)
    elif device.type == "cuda" and flex_obstacle(model) is None:
        install_attention_kernel(model, FASTEST["attention"])


def _loss(choice: str) -> str:
    if choice == "liger":
        _liger.liger("loss='liger'")
    return {"chunked": "a chunk of logits at a time", "whole": "all logits at once", "liger": "Liger"}[choice]


def _swap_norms(model: PreTrainedModel, choice: str, device: torch.device) -> str:
    if choice == "compile":
        return "the model's own"
    make = {"liger": _liger.norm_kernel, "te": _transformer_engine.norm_kernel}[choice]
    return _described(model, f"norm={choice!r}", "norms", *swap_norms(model, make))


def _swap_activations(model: PreTrainedModel, choice: str, device: torch.device) -> str:
    if choice == "compile":
        return "the model's own"
    return _described(model, f"activation={choice!r}", "gated MLPs", *swap_gated_mlps(model, _liger.gate_kernel))


def _swap_rope(model: PreTrainedModel, choice: str, device: torch.device) -> str:
    if choice == "compile":
        restore_rope(model)
        return "the model's own"
    return f"Liger ({', '.join(swap_rope(model, _liger.rope_kernel(), device))})"


_SWAPS: dict[str, Callable[[PreTrainedModel, str, torch.device], str]] = {
    "norm": _swap_norms,
    "activation": _swap_activations,
    "rope": _swap_rope,
}


def _choose_linear(model: PreTrainedModel, kernels: KernelsConfig, device: torch.device) -> str:
    if kernels.linear == "te":
        return _described(model, "linear='te'", "layers", *convert_to_te(model, kernels.fp8))
    if kernels.fp8 in _transformer_engine.RECIPES:
        raise ValueError(
            f"fp8={kernels.fp8!r} is a recipe of TransformerEngine: set linear='te'. With linear='torch': "
            f"{', '.join(RECIPES)}."
        )
    if kernels.fp8 is not None:
        convert_to_fp8(model, kernels.fp8, device, all_gather=kernels.fp8_all_gather)
    return "torch"


def _described(model: PreTrainedModel, asked: str, kind: str, swapped: list[str], left: dict[str, str]) -> str:
    """For the ledger; ValueError where nothing was swapped."""
    some = ", ".join(f"{name} ({why})" for name, why in list(left.items())[:3])
    some += f" and {len(left) - 3} more" if len(left) > 3 else ""
    if not swapped:
        found = f": {some}" if left else ""
        what = f"{type(model).__name__} has no {kind} that it can compute"
        raise ValueError(f"{asked} would change nothing: {what}{found}. Leave it at 'auto'.")
    library = asked.partition("=")[2].strip("'")
    return f"{_LIBRARIES[library]} ({len(swapped)} {kind})" + (f"; not {some}" if left else "")


_LIBRARIES = {"liger": "Liger", "te": "TransformerEngine"}
