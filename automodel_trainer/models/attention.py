"""Attention kernels for packed rows, as Hugging Face attention functions: no mask of `s × s` is ever made.

Transformers describes packed rows by a mask `[b, 1, s, s]`, with which attention can use neither its fastest kernels
nor the fact that most of a row is not looked at. Here the mask that travels through the model is the list of document
boundaries `[n + 1]` instead, and attention runs over documents of different lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from automodel_trainer.models.varlen import varlen_attention

NAME = "varlen"
_HALF = (torch.bfloat16, torch.float16)
_documents: Tensor | None = None  # of the micro-batch whose masks are being made


def set_documents(boundaries: Tensor | None) -> None:
    """The rows of the forward that begins are packed from documents that begin at these positions.

    Args:
        boundaries: int32 `[n + 1]`, counted over all rows one after the other, from 0 to `b · s`; documents at the end
            may be empty. None: each row is one document, or it is not known.
    """
    global _documents
    _documents = boundaries


def install_varlen(model: PreTrainedModel) -> None:
    """Let `model` attend over documents of packed rows one by one, and as before (`sdpa`) to all other rows.

    Raises:
        ValueError: the model needs something of attention that the kernel does not do.
    """
    obstacle = varlen_obstacle(model)
    if obstacle:
        raise ValueError(f"attention='varlen' does not fit {type(model).__name__}: {obstacle}. Use 'sdpa'.")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


def varlen_obstacle(model: PreTrainedModel) -> str | None:
    """Why `model` cannot attend with the variable-length kernel; None if it can."""
    config = model.config.get_text_config(decoder=True)
    kernel = str(getattr(config, "_attn_implementation", None) or "eager")
    if kernel != "sdpa":
        return f"it attends with {kernel!r}, by its own choice or yours"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if getattr(config, "attention_dropout", 0):
        return "it has attention dropout"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores"
    key = (getattr(config, "qk_nope_head_dim", 0) or 0) + (getattr(config, "qk_rope_head_dim", 0) or 0)
    if key and key != getattr(config, "v_head_dim", key):
        return "its keys and values have different widths"
    width = key or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width > 256 or width % 8:
        return f"its heads are {width} wide, and the kernel wants a multiple of 8 up to 256"
    return None


def _mask(*, dtype: torch.dtype = torch.float32, local_size: int | None = None, **arguments: Any) -> Tensor | None:
    """Document boundaries where they are known, else what `sdpa` would be given.

    A sliding window is not in the boundaries: attention functions are told of it by the layer.
    """
    plain = arguments.get("attention_mask") is None and not arguments.get("use_vmap")  # nothing of the model's own
    if _documents is not None and dtype in _HALF and plain:
        return _documents
    return sdpa_mask(dtype=dtype, local_size=local_size, **arguments)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query `[b, h, s, d]`, key and value `[b, h_kv, s, d]`; out `[b, s, h, d]`."""
    if attention_mask is None or attention_mask.ndim != 1:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
        return out, None
    rows, _, length, _ = query.shape
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    out = varlen_attention(*flat, attention_mask, length, scaling, sliding_window)
    return out.unflatten(0, (rows, length)), None
