"""Attention for packed rows, as a Hugging Face attention function that never makes a mask of `s × s`.

Transformers describes packed rows by a mask `[b, 1, s, s]`. With such a mask attention cannot use its fastest kernels,
and it cannot skip the parts of a row that no query looks at. FlexAttention (arXiv 2412.05496) only needs to know which
blocks of 128 tokens look at each other, and that follows from where documents begin. We make this block mask once per
forward and kind of layer, without waiting for the device. Rows of one document go to the kernel of a library.

Some models have terms in their softmax that `sdpa` lacks: soft caps, or sinks. They attend eagerly in transformers,
with scores of `s × s`. Here FlexAttention computes all their rows (`flex_only.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from automodel_trainer.models._masks import is_plain, keeps_documents_apart
from automodel_trainer.models._transformers import attention_of, offers_flex_attention, offers_sdpa
from automodel_trainer.models.kernels import flex_only
from automodel_trainer.models.kernels.flex_offsets import passes_32_bits
from automodel_trainer.models.kernels.library import AttentionFunction, KernelLibrary, wrong_dtype
from automodel_trainer.models.kernels.registry import find, libraries
from automodel_trainer.models.record import recorded
from automodel_trainer.nn.documents import current_documents
from automodel_trainer.nn.kept_results import results_are_kept, with_kept_results

BLOCK = 128
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_HALF = (torch.bfloat16, torch.float16)


def attention_name(kernel: str) -> str:
    """The name under which transformers knows a library's attention.

    Transformers takes any name with "flash" in it for one of the flash-attn package.
    """
    return f"amt_{kernel.replace('flash', 'fa')}"


NAME = attention_name("flex")
ONLY = attention_name("flex_only")


def attention_text(name: str) -> str:
    """The ledger's text for the attention of this name in transformers."""
    if name == ONLY:
        return "FlexAttention"
    titles = {attention_name(lib.name): lib.title for lib in libraries() if "attention" in lib.offers}
    return f"FlexAttention for packed rows, {titles[name]} for others" if name in titles else name


def install_attention_kernel(model: PreTrainedModel, kernel: str = "flex") -> None:
    """Let `model` attend to packed rows through FlexAttention, and to rows of one document through `kernel`.

    Rows with a mask of their own (padding, windows) go to `sdpa` as before.

    Args:
        kernel: name of a library that offers attention. With "flex" torch chooses a kernel for rows of one document.

    Raises:
        ValueError: there is no such library, or the model needs something of attention that this cannot do.
    """
    library = find("attention", kernel)
    if library is None:
        raise ValueError(f"No kernel library with attention is called {kernel!r}.")
    obstacle = flex_obstacle(model)
    if obstacle:
        raise ValueError(
            f"attention={kernel!r} does not fit {type(model).__name__}: {obstacle}. Use 'sdpa' or 'eager'."
        )
    if not offers_sdpa(model):
        if kernel != "flex":
            raise ValueError(
                f"attention={kernel!r} does not fit {type(model).__name__}: its softmax has terms (soft caps, sinks) "
                "that only FlexAttention computes. Use 'flex' or 'eager'."
            )
        AttentionInterface.register(ONLY, flex_only.attend)
        AttentionMaskInterface.register(ONLY, _mask_of_blocks)
        model.set_attn_implementation(ONLY)
        return
    plain = library.attention()
    name = attention_name(kernel)
    is_sdpa = plain is sdpa_attention_forward
    AttentionInterface.register(name, partial(_attention, plain if is_sdpa else _in_its_dtype(plain, library)))
    AttentionMaskInterface.register(name, partial(_mask, kernel=None if is_sdpa else kernel))
    model.set_attn_implementation(name)


@dataclass(frozen=True)
class AttentionAsked:
    """An entry of a model's record: the name of the attention that its builder was asked for."""

    name: str


def flex_obstacle(model: PreTrainedModel) -> str | None:
    """Why `model` cannot attend through FlexAttention; None if it can."""
    config = model.config.get_text_config(decoder=True)
    kernel, asked = attention_of(config), recorded(model, AttentionAsked)
    chosen_by_transformers = "sdpa" if offers_sdpa(model) else "eager"
    if kernel != chosen_by_transformers or (asked is not None and asked.name == "eager"):
        return f"its attention is already set to {kernel!r}"
    if not offers_flex_attention(model):
        return "transformers does not offer it for this model"
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if getattr(config, "attention_dropout", 0):
        return "it has attention dropout"
    return None


def document_block_mask(numbers: Tensor, window: int | None = None) -> BlockMask:
    """The block mask of causal attention within documents, for FlexAttention.

    Args:
        numbers: int64 `[b, s]`, see `set_documents`.
        window: how many tokens a query sees, itself included; None: all before it.
    """
    length = numbers.shape[1]
    blocks = -(-length // BLOCK)
    padded = F.pad(numbers, (0, blocks * BLOCK - length), value=-1).unflatten(1, (blocks, BLOCK))
    first, last = padded[:, :, 0], padded.amax(-1)
    row = torch.arange(blocks, device=numbers.device)
    distance = (row[:, None] - row[None, :]) * BLOCK  # of the first tokens of a query and a key block
    looked_at = (distance >= 0) & (last[:, None, :] >= first[:, :, None])
    one_document = (first == last) & (padded[:, :, -1] >= 0)
    whole = (distance > 0) & (first[:, :, None] == first[:, None, :]) & one_document[:, :, None]
    whole &= one_document[:, None, :]
    if window is not None:
        looked_at &= distance - (BLOCK - 1) < window
        whole &= distance + BLOCK - 1 < window

    def looks_at(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (numbers[b, query] == numbers[b, key])
        return seen if window is None else seen & (query - key < window)

    return BlockMask.from_kv_blocks(
        *_listed(looked_at & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=looks_at, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The True entries of bool `[b, q, k]` as FlexAttention wants them.

    Returns:
        how many key blocks each query block has, int32 `[b, 1, q]`, and which ones, int32 `[b, 1, q, k]`.
    """
    which = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32)[:, None], which[:, None]


def _mask(
    *,
    kernel: str | None,
    dtype: torch.dtype = torch.float32,
    local_size: int | None = None,
    use_vmap: bool = False,
    **arguments: Any,
) -> Tensor | BlockMask | None:
    """The block mask of packed rows in half precision, else the mask that `sdpa` would get.

    A mask that is more than causal within documents and windows (chunks, spans that see each other both ways, functions
    that a model adds) is made as `sdpa` has it.

    Args:
        kernel: name of the library for rows of one document; None: `sdpa` is that too.
    """
    documents = current_documents()
    if documents is not None and _fits_blocks(dtype, use_vmap, arguments):
        return document_block_mask(documents, local_size)
    mask: Tensor | None = sdpa_mask(dtype=dtype, local_size=local_size, use_vmap=use_vmap, **arguments)
    if mask is not None and kernel is not None and torch.is_grad_enabled():
        _warn_of_masks(kernel)
    return mask


def _mask_of_blocks(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    dtype: torch.dtype = torch.float32,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **arguments: Any,
) -> Tensor | BlockMask:
    """The block mask of rows without padding in half precision, else the mask that `eager` would get."""
    documents = current_documents()
    if documents is None and not keeps_documents_apart(arguments["mask_function"]):
        documents = torch.zeros(batch_size, q_length, dtype=torch.int64, device=device)
    if documents is not None and q_length == kv_length > 1 and _fits_blocks(dtype, use_vmap, arguments):
        return document_block_mask(documents, local_size)
    arguments |= {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "device": device}
    return eager_mask(dtype=dtype, local_size=local_size, use_vmap=use_vmap, **arguments)


def _fits_blocks(dtype: torch.dtype, use_vmap: bool, arguments: dict[str, Any]) -> bool:
    """Whether a mask is no more than causal within documents and windows, for a kernel in half precision."""
    unmasked = arguments.get("attention_mask") is None and not use_vmap
    return dtype in _HALF and unmasked and is_plain(arguments["mask_function"])


@cache
def _warn_of_masks(kernel: str) -> None:
    warnings.warn(
        f"attention={kernel!r}: rows with padding, and windows shorter than a row, attend through sdpa instead. Packed "
        "rows have no padding.",
        stacklevel=2,
    )


def _attention(
    plain: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query `[b, h, s, d]`, key and value `[b, h_kv, s, d]`; out `[b, s, h, d]`."""
    if isinstance(attention_mask, BlockMask):
        far = passes_32_bits(query, key, value)
        attend: Callable[..., Any] = flex_only.attend if far else flex_attention_forward
    else:
        causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
        whole = attention_mask is None and query.shape[2] == key.shape[2] > 1  # no mask, and no cache
        attend = plain if whole and causal else sdpa_attention_forward
        if results_are_kept():
            attend = partial(with_kept_results, attend)
    return attend(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def _in_its_dtype(plain: AttentionFunction, library: KernelLibrary) -> AttentionFunction:
    """The library's attention, with tensors cast to autocast's dtype. It refuses dtypes that the library lacks."""
    allowed = library.offers["attention"].dtypes

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        if allowed and dtype not in allowed:
            raise ValueError(wrong_dtype(dtype, library, "attention"))
        return plain(module, query.to(dtype), key.to(dtype), value.to(dtype), attention_mask, **kwargs)

    return attend
