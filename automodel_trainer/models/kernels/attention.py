"""Attention for packed rows, as a Hugging Face attention function: no mask of `s × s` is ever made.

Transformers describes packed rows by a mask `[b, 1, s, s]`, with which attention can use neither its fastest kernels
nor the fact that most of a row is not looked at. FlexAttention (arXiv 2412.05496) wants to know only which blocks of
128 tokens look at each other, and that follows from where documents begin: the block mask is made once per forward and
kind of layer, without waiting for the device. Rows of one document go to `sdpa`, which has faster kernels for them, or
to one of its kernels, or another library's, by name (`KERNELS`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from automodel_trainer.models.kernels.libraries import _transformer_engine
from automodel_trainer.nn.documents import current_documents

NAME = "amt_flex"
# Names that transformers gets to know; it takes any with "flash" in it for the flash-attn package.
KERNELS = {"flex": NAME, "cudnn": "amt_cudnn", "flash": "amt_fa", "te": "amt_te"}
TEXTS = {  # for the ledger
    NAME: "FlexAttention for packed rows, sdpa for others",
    "amt_cudnn": "FlexAttention for packed rows, cuDNN for others",
    "amt_fa": "FlexAttention for packed rows, torch's FlashAttention for others",
    "amt_te": "FlexAttention for packed rows, TransformerEngine for others",
}
BLOCK = 128
_HALF = (torch.bfloat16, torch.float16)


def install_attention_kernel(model: PreTrainedModel, kernel: str = "flex") -> None:
    """Let `model` attend to packed rows through FlexAttention, and to rows of one document through `kernel`.

    Rows with a mask of their own (padding, windows) go to `sdpa` as before.

    Args:
        kernel: of `KERNELS`; "flex" lets torch choose one for rows of one document.

    Raises:
        ValueError: the model needs something of attention that this does not do.
    """
    obstacle = flex_obstacle(model)
    if obstacle:
        raise ValueError(
            f"attention={kernel!r} does not fit {type(model).__name__}: {obstacle}. Use 'sdpa' or 'eager'."
        )
    if kernel == "te":
        _transformer_engine.transformer_engine("attention='te'")
    name = KERNELS[kernel]
    AttentionInterface.register(name, partial(_attention, _PLAIN[kernel]))
    AttentionMaskInterface.register(name, partial(_mask, kernel=kernel))
    model.set_attn_implementation(name)


def flex_obstacle(model: PreTrainedModel) -> str | None:
    """Why `model` cannot attend through FlexAttention; None if it can."""
    config = model.config.get_text_config(decoder=True)
    kernel = str(getattr(config, "_attn_implementation", None) or "eager")
    if kernel != "sdpa":
        return f"it attends with {kernel!r}, by its own choice or yours"
    if not getattr(model, "_supports_flex_attn", False):
        return "transformers does not offer it for this model"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if getattr(config, "attention_dropout", 0):
        return "it has attention dropout"
    return None


def document_block_mask(numbers: Tensor, window: int | None = None) -> BlockMask:
    """Causal attention within documents, as FlexAttention wants it.

    Args:
        numbers: int64 `[b, s]`, see `set_documents`.
        window: tokens that a query sees, itself included; None: all before it.
    """
    length = numbers.shape[1]
    blocks = -(-length // BLOCK)
    padded = F.pad(numbers, (0, blocks * BLOCK - length), value=-1).unflatten(1, (blocks, BLOCK))
    first, last = padded[:, :, 0], padded.amax(-1)
    row = torch.arange(blocks, device=numbers.device)
    distance = (row[:, None] - row[None, :]) * BLOCK  # of the first tokens of a query and a key block
    some = (distance >= 0) & (last[:, None, :] >= first[:, :, None])
    one_document = (first == last) & (padded[:, :, -1] >= 0)
    whole = (distance > 0) & (first[:, :, None] == first[:, None, :]) & one_document[:, :, None]
    whole &= one_document[:, None, :]
    if window is not None:
        some &= distance - (BLOCK - 1) < window
        whole &= distance + BLOCK - 1 < window

    def looks_at(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (numbers[b, query] == numbers[b, key])
        return seen if window is None else seen & (query - key < window)

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=looks_at, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool `[b, q, k]`: how many key blocks a query block has, int32 `[b, 1, q]`, and which, `[b, 1, q, k]`."""
    which = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32)[:, None], which[:, None]


def _mask(
    *,
    kernel: str,
    dtype: torch.dtype = torch.float32,
    local_size: int | None = None,
    use_vmap: bool = False,
    **arguments: Any,
) -> Tensor | BlockMask | None:
    """The block mask of packed rows in half precision, else what `sdpa` would be given."""
    plain = arguments.get("attention_mask") is None and not use_vmap  # nothing of the model's own on top
    documents = current_documents()
    if documents is not None and dtype in _HALF and plain:
        return document_block_mask(documents, local_size)
    mask: Tensor | None = sdpa_mask(dtype=dtype, local_size=local_size, use_vmap=use_vmap, **arguments)
    if mask is not None and kernel != "flex" and torch.is_grad_enabled():
        _warn_of_masks(kernel)
    return mask


@cache
def _warn_of_masks(kernel: str) -> None:
    warnings.warn(
        f"attention={kernel!r}: rows with padding, and windows shorter than a row, attend through sdpa instead. Packed "
        "rows have no padding.",
        stacklevel=2,
    )


def _attention(
    plain: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query `[b, h, s, d]`, key and value `[b, h_kv, s, d]`; out `[b, s, h, d]`."""
    if isinstance(attention_mask, BlockMask):
        attend: Callable[..., Any] = flex_attention_forward
    else:
        causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
        whole = attention_mask is None and query.shape[2] == key.shape[2] > 1  # neither masked nor from a cache
        attend = plain if whole and causal else sdpa_attention_forward
        if attend is not sdpa_attention_forward:
            query, key, value = _in_half_precision(query, key, value)
    return attend(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def _in_half_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast has it; ValueError where they stay in another precision."""
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[0].dtype
    if dtype not in _HALF:
        raise ValueError(
            f"kernels attention: this kernel computes in bf16 or fp16, and the run in {dtype}. Set precision='bf16', "
            "or attention='sdpa'."
        )
    return tuple(tensor.to(dtype) for tensor in tensors)


def _through(backend: SDPBackend) -> Callable[..., Any]:
    def attend(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(backend):
            return sdpa_attention_forward(*args, **kwargs)

    return attend


def _through_te(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if any(kwargs.get(name) for name in ("dropout", "softcap")) or any(
        kwargs.get(name) is not None for name in ("s_aux", "position_bias")
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    return _transformer_engine.causal_attention(query, key, value, kwargs.get("scaling")), None


_PLAIN: dict[str, Callable[..., Any]] = {
    "flex": sdpa_attention_forward,
    "cudnn": _through(SDPBackend.CUDNN_ATTENTION),
    "flash": _through(SDPBackend.FLASH_ATTENTION),
    "te": _through_te,
}
