"""The cases of `numerics.py` for the loss and the layers. Attention is in `numerics_attention.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


@dataclass
class Made:
    """A fast path and its reference, ready to run.

    Args:
        ours: computes the output with the fast path.
        theirs: computes the output with the reference.
        leaves: tensors to differentiate `ours` by. Empty: forward only.
        references: the same tensors for `theirs`, in fp32.
    """

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()
    references: Sequence[Tensor] = ()


@dataclass
class Setting:
    """The device and the sizes of a case."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def small(self) -> bool:
        return self.device.type == "cpu"

    def randn(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        made = torch.randn(*shape, generator=self.generator) * scale
        return made.to(self.device, self.dtype).requires_grad_(grad)

    def wide(self, *tensors: Tensor) -> list[Tensor]:
        return [t.detach().float().requires_grad_(t.requires_grad) for t in tensors]


# --- the loss ---------------------------------------------------------------------------------------------------------


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Make the chunks of the loss so small that there are several."""
    from automodel_trainer.modules import linear_cross_entropy, loss

    before = linear_cross_entropy.chunk_rows
    linear_cross_entropy.chunk_rows = loss.chunk_rows = lambda *_: rows  # type: ignore[assignment]
    try:
        yield
    finally:
        linear_cross_entropy.chunk_rows = loss.chunk_rows = before


def targets_of(setting: Setting, tokens: int, vocabulary: int) -> Tensor:
    targets = torch.randint(vocabulary, (1, tokens), generator=setting.generator)
    targets[torch.rand(1, tokens, generator=setting.generator) < 0.3] = -100
    return targets.to(setting.device)


def chunked_loss(frozen: bool = False, bias: bool = False, cap: float | None = None) -> Callable[[Setting], Made]:
    def make(setting: Setting) -> Made:
        from automodel_trainer.modules.loss import summed_loss
        from automodel_trainer.nn.deferred_logits import DeferredLogits

        tokens, width, vocabulary = (61, 32, 263) if setting.small else (1021, 512, 32003)
        head = nn.Linear(width, vocabulary, bias=bias, device=setting.device, dtype=setting.dtype)
        hidden, weight = setting.randn(1, tokens, width), setting.randn(vocabulary, width, scale=0.2, grad=not frozen)
        head.weight = nn.Parameter(weight.detach(), requires_grad=not frozen)
        targets = targets_of(setting, tokens, vocabulary)

        def ours() -> Tensor:
            logits: Any = DeferredLogits(hidden, head.forward, head)
            with chunks_of(17 if setting.small else 256):
                return summed_loss(logits if cap is None else torch.tanh(logits / cap) * cap, targets)

        wide, *parameters = setting.wide(hidden, *head.parameters())

        def theirs() -> Tensor:
            logits = F.linear(wide, *parameters)
            logits = logits if cap is None else torch.tanh(logits / cap) * cap
            return F.cross_entropy(logits[0], targets[0], ignore_index=-100, reduction="sum")

        leaves, references = [hidden, *head.parameters()], [wide, *parameters]
        return Made(ours, theirs, *([t for t in ts if t.requires_grad] for ts in (leaves, references)))

    return make


# --- layers -----------------------------------------------------------------------------------------------------------


def compiled_blocks(lora: bool = False, fp8: bool = False) -> Callable[[Setting], Made]:
    """Two compiled blocks of a llama shape (with inductor on a GPU).

    Args:
        lora: with adapters, computed in one matmul with their weights. The reference has merged weights.
        fp8: matmuls of weights in fp8; frozen weights are stored in fp8.
    """

    def make(setting: Setting) -> Made:
        from automodel_trainer.models.kernels.fp8 import convert_to_fp8
        from automodel_trainer.strategies.base.compile import compile_blocks

        model, reference = llamas(setting)
        if lora:
            adapt(model, setting, fp8)
        elif fp8:
            convert_to_fp8(model, "tensorwise", setting.device, emulate=setting.small)
        compile_blocks(model.train(), "aot_eager" if setting.small else "inductor")
        x = setting.randn(2, 37 if setting.small else 517, model.config.hidden_size)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "embed" not in n}
        wide = dict(zip(["x", *trained], setting.wide(x, *trained.values())))

        def ours() -> Tensor:
            return model(inputs_embeds=x, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

        def theirs() -> Tensor:
            weights = merged(reference, model, wide) if lora else wide
            inputs = {"inputs_embeds": wide["x"], "use_cache": False}
            return functional_call(reference, weights, kwargs=inputs).last_hidden_state  # type: ignore[no-any-return]

        return Made(ours, theirs, [x, *trained.values()], list(wide.values()))

    return make


def llamas(setting: Setting) -> tuple[Any, Any]:
    """A model and a copy in fp32 with the same values. Weights are large, so that each block changes its input."""
    from transformers import LlamaConfig, LlamaModel

    width = 32 if setting.small else 512
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2, "vocab_size": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, initializer_range=0.5 * width**-0.5, attn_implementation="sdpa")
    torch.manual_seed(setting.generator.initial_seed() % 2**31)
    model, reference = (LlamaModel(config).to(setting.device) for _ in range(2))
    for parameter in model.parameters():  # but not buffers, such as the angles of the rotary embedding
        parameter.data = parameter.data.to(setting.dtype)
    reference.load_state_dict(model.state_dict())
    return model, reference.train()


def adapt(model: Any, setting: Setting, fp8: bool) -> None:
    from automodel_trainer.models.kernels.choose import KernelsConfig, apply_kernels
    from automodel_trainer.models.kernels.fp8 import convert_to_fp8
    from automodel_trainer.models.lora import LoRAConfig, adapters, apply_lora, finish_lora

    apply_lora(model, LoRAConfig(rank=8, alpha=4), dtype=setting.dtype)
    if fp8:
        convert_to_fp8(model, "tensorwise", setting.device, emulate=setting.small)
    apply_kernels(model, KernelsConfig(attention="sdpa", lora="fused"), setting.device)
    finish_lora(model)
    for adapter in adapters(model):
        scale = adapter.a.weight.shape[1] ** -0.5  # makes an update about a quarter as large as the weight
        adapter.b.weight.data = setting.randn(*adapter.b.weight.shape, scale=scale, grad=False)


def merged(reference: Any, model: Any, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the reference, with the updates of these factors added."""
    from automodel_trainer.models.lora import adapters

    weights = dict(reference.named_parameters())
    for adapter in adapters(model):
        a, b = (factors[f"{adapter.target}.lora_{part}.weight"] for part in "AB")
        weights[f"{adapter.target}.weight"] = weights[f"{adapter.target}.weight"] + adapter.scaling * b @ a
    return weights


class OneBlock(nn.Module):
    """A model with one block, which is one linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"linear": layer})])


def linear_sizes(setting: Setting) -> tuple[int, int, int]:
    """Number of tokens, input width and output width."""
    return (48, 64, 32) if setting.small else (1040, 1024, 2048)


def fp8(recipe: str) -> Callable[[Setting], Made]:
    def make(setting: Setting) -> Made:
        from automodel_trainer.models.kernels.fp8 import convert_to_fp8

        tokens, inputs, outputs = linear_sizes(setting)
        layer = nn.Linear(inputs, outputs, bias=False, device=setting.device, dtype=setting.dtype)
        model = OneBlock(layer)
        x, (weight,) = setting.randn(tokens, inputs), setting.wide(layer.weight)
        (wide,) = setting.wide(x)
        convert_to_fp8(model, recipe, setting.device, emulate=setting.small)  # type: ignore[arg-type]
        converted: Any = model.layers[0]["linear"]  # type: ignore[index]
        return Made(lambda: converted(x), lambda: F.linear(wide, weight), [x, converted.weight], [wide, weight])

    return make


def lora(widened: bool) -> Callable[[Setting], Made]:
    """Two layers that share an input; the second is half as wide."""

    def make(setting: Setting) -> Made:
        from automodel_trainer.models.lora.fused import FusedDense, refresh
        from automodel_trainer.models.lora.layers import LoRALinear, adapt_linear

        tokens, inputs, outputs = linear_sizes(setting)
        x, scaling = setting.randn(tokens - 1, inputs), 0.5
        layers: list[LoRALinear] = []
        for out, rank in ((outputs, 5), (outputs // 2, 3)):
            layer: Any = nn.Linear(inputs, out, bias=False, device=setting.device, dtype=setting.dtype)
            layer.weight.requires_grad_(False)
            adapt_linear(layer, rank, scaling, dropout=0.0, dora=False, dtype=setting.dtype)
            layer.lora_A.weight.data = setting.randn(rank, inputs, scale=inputs**-0.5, grad=False)
            layer.lora_B.weight.data = setting.randn(out, rank, grad=False)
            layers.append(layer)
        plain = [setting.wide(layer.weight)[0] for layer in layers]
        factors = [factor.weight for layer in layers for factor in (layer.lora_A, layer.lora_B)]
        wide = setting.wide(x, *factors)

        def ours() -> Tensor:
            if not widened:
                return torch.cat([layer(x) for layer in layers], 1)
            group = FusedDense(layers)
            refresh([group])
            return torch.cat(list(group.outputs_of(x)), 1)

        def theirs() -> Tensor:
            pairs = zip(plain, wide[1::2], wide[2::2])
            return torch.cat([wide[0] @ (weight + scaling * b @ a).T for weight, a, b in pairs], 1)

        return Made(ours, theirs, [x, *factors], wide)

    return make


def nf4(setting: Setting) -> Made:
    """A quantized weight against the values that it represents."""
    from automodel_trainer.models.quantization.quantize import quantized

    tokens, inputs, outputs = linear_sizes(setting)
    weight = quantized(setting.randn(outputs, inputs, grad=False), "nf4")
    x = setting.randn(tokens - 1, inputs)
    (wide,) = setting.wide(x)
    plain = weight.get_original_weight().float()  # type: ignore[attr-defined]
    return Made(lambda: F.linear(x, weight), lambda: F.linear(wide, plain), [x], [wide])
