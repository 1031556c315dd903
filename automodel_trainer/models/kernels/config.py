"""The `kernels:` section."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from automodel_trainer.models.kernels.fp8 import RECIPES
from automodel_trainer.models.kernels.registry import BUILT_IN, choices

# What "auto" is on a GPU: what benchmarks/kernels.py measures to be fastest (see benchmarks/RESULTS.md).
FASTEST = {
    "attention": "flex",
    "loss": "chunked",
    "norm": "compile",
    "activation": "compile",
    "rope": "compile",
    "linear": "torch",
    "experts": "grouped",
}
# What "auto" is elsewhere, and where the fastest does not fit the model. For attention transformers chooses.
PLAIN = {part: names[0] for part, names in BUILT_IN.items() if names}
LORA = ("auto", "fused", "separate")
_LORA_ALIASES = {"widened": "fused"}


@dataclass
class KernelsConfig:
    """The `kernels:` section; docs/kernels.md has each choice, when it is refused, and what "auto" is.

    Args:
        attention: `flex` (packed rows through FlexAttention, others through the kernel that torch chooses), `cudnn`,
            `flash` or `te` (others through cuDNN, FlashAttention or TransformerEngine); GPU only. Or any of
            transformers' names (sdpa, eager, flex_attention, flash_attention_2, …). `auto`: flex on a GPU if the model
            allows it, else what transformers chooses.
        loss: `chunked` (logits of a chunk of tokens at a time), `whole` (all logits at once) or `liger`.
        norm: `compile` (the model's own, compiled with its block), `liger` or `te`.
        activation: of gated MLPs, together with the product: `compile` or `liger`.
        rope: rotary position embedding: `compile` or `liger`.
        linear: of the blocks: `torch` or `te` (TransformerEngine).
        experts: of a mixture: `grouped` (tokens sorted by expert, all experts in grouped matmuls, adapters as factors;
            see `models/kernels/experts.py`) or `transformers` (what the config's `experts_implementation` says).
        dispatch: what carries tokens between ranks under expert parallel (ep > 1): `all_to_all`, or `deepep` (GPUs of
            one host that reach each other's memory, in bf16). `auto`: deepep where all ranks have it.
        fp8: linear layers of the blocks multiply in fp8 (NVIDIA GPUs since Ada and Hopper). By torchao: `tensorwise`
            (fastest), `rowwise` (more exact) or `rowwise_with_gw_hp` (gradients of weights in bf16); with `linear: te`:
            `delayed` (fastest), `current` or `block`. None: they do not.
        fp8_all_gather: with `fp8: tensorwise`, FSDP2 casts trained weights before it gathers them. That halves the
            traffic, and no rank casts a whole weight. `auto`: if FSDP2 shards over several ranks, without tp and
            without cpu_offload; True: the same, but an error where it is not possible; False: weights are gathered in
            the dtype that they compute in, and cast then.
        lora: `fused` (the frozen weights of layers that share an input, and their adapters, in one matmul; see
            `models/lora/fused.py`; compiled blocks only), `separate`, or `auto`: fused on a GPU for every layer whose
            weight lies whole on it. `widened` is an older name of `fused`.

    Each library that is registered (`automodel_trainer.models.kernels.register`) adds its name to the choices of the
    parts that it offers.

    Raises:
        ValueError: an unknown choice.
    """

    attention: str = "auto"
    loss: str = "auto"
    norm: str = "auto"
    activation: str = "auto"
    rope: str = "auto"
    linear: str = "auto"
    experts: str = "auto"
    dispatch: str = "auto"
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
        self.lora = _LORA_ALIASES.get(self.lora, self.lora)
        for part, built_in in {**BUILT_IN, "lora": LORA}.items():
            chosen = getattr(self, part)
            if part == "attention" or chosen == "auto" or chosen in built_in:  # transformers knows its own names
                continue
            if chosen not in (allowed := LORA if part == "lora" else choices(part)):
                raise ValueError(f"kernels {part}={chosen!r} is unknown. Allowed: {', '.join(allowed)}.")

    def on(self, device: torch.device) -> KernelsConfig:
        """The same with a choice in place of every "auto" but two.

        Attention depends on the model, and dispatch on the ranks that a layout gives it.
        """
        best = FASTEST if device.type == "cuda" else PLAIN
        here = FASTEST.keys() & PLAIN.keys()
        chosen: dict[str, Any] = {part: best[part] for part in here if getattr(self, part) == "auto"}
        return replace(self, **chosen)
