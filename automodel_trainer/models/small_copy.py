"""A small copy of a model that its family's own code takes: shallow and narrow, or one of both."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models.build import build_on_meta
from automodel_trainer.models.initialize import initialize_weights
from automodel_trainer.models.shrink import shrink
from automodel_trainer.nn.text import first_line

TOKENS = 24
"""Windows and chunks are narrowed for rows of this many tokens, so that they bind inside a document."""
VOCABULARY = 96
RANKS = 4
"""Heads and widths of the copy divide by so many, as some families divide their own."""
LARGEST = 300_000_000
"""Parameters of a copy that is still run: towers are made shallow, and not narrow."""
SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"layers": 8},  # kinds of layers that alternate
    {"depth": False},
    {"width": False},
    {"width": False, "depth": False},
)
"""How small a copy may be (`shrink`). The first size that a family's own code takes is taken."""
CPU = torch.device("cpu")
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments that say which tokens are text (0). Some families ask for them in training."""


def small_copy(
    config: PreTrainedConfig,
    auto_class: str,
    *,
    ranks: int = RANKS,
    length: int = TOKENS,
    vocab_size: int = VOCABULARY,
    layers: int = 0,
    attention: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A small model with a layer of each kind and random weights, none of which is zero or one throughout.

    Args:
        config: of the whole model; it is not changed.
        auto_class: the transformers auto class that builds it.
        ranks, length, vocab_size, layers: see `shrink`.
        attention: transformers' name of the attention kernel; None: the model's default.
        trust_remote_code: run model code that comes with the checkpoint.
        device, dtype: of the copy.
        seed: of its weights.

    Raises:
        ValueError: it would not be small, or would lack a kind of layer, or does not run.
    """
    try:
        whole = build_on_meta(auto_class, config, dtype, attention, trust_remote_code)
    except Exception as error:
        raise ValueError(f"{auto_class} could not build the model to check it ({first_line(error)})") from error
    first: Exception | None = None
    for size in SIZES:
        try:
            size = {**size, "layers": max(layers, size.get("layers", 0))}
            small = _with_ordinary_ids(shrink(config, ranks, length, vocab_size, **size))
            model = build_on_meta(auto_class, small, dtype, attention, trust_remote_code)
            if missing := _kinds(whole) - _kinds(model):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            if (count := sum(p.numel() for p in model.parameters())) > LARGEST:
                raise ValueError(f"it has {count:,} parameters")
            _draw(model, device, seed)
            packing_without_sync(model)
            with torch.no_grad():
                model(**text_inputs(model, ordinary_tokens(small)[:TOKENS][None].to(device)))
        except Exception as error:  # a family's own code may fail anywhere on sizes that nobody has
            first = first or error
            continue
        return model
    raise ValueError(f"no small copy of {type(whole).__name__} could be made to check it ({first_line(first)})")


def ordinary_tokens(config: PreTrainedConfig) -> Tensor:
    """Ids that the config gives no meaning: int64 `[n]`."""
    text = config.get_text_config(decoder=True)
    named = [item for part in (config, text) for item in part.to_dict().items()]
    special = {i for name, i in named if name.endswith(("token_id", "token_index")) and isinstance(i, int)}
    return torch.tensor([i for i in range(3, text.vocab_size) if i not in special])


def text_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What the forward takes for tokens `[b, s]` that are all text."""
    named = inspect.signature(type(model).forward).parameters
    return {"input_ids": ids, **{name: torch.zeros_like(ids) for name in TOKEN_TYPES if name in named}}


def _draw(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    """The model's own random weights and some noise: a gate that starts at zero would hide what is behind it."""
    initialize_weights(model, device, seed, strict=False)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, device=device)
                spread = min(0.5, parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else 0.1
                parameter.add_((spread * noise).to(parameter.dtype))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _with_ordinary_ids(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a small vocabulary without a padding id beyond it, which embeddings look at."""
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if isinstance(pad := getattr(part, "pad_token_id", None), int) and pad >= part.get_text_config().vocab_size:
            part.pad_token_id = 0
    return config


def _kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}
