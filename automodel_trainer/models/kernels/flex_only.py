"""FlexAttention for models whose softmax has terms that `sdpa` lacks: soft caps of the scores, and sinks.

A sink is a learned score for each head. It takes part in the softmax and has no value, so that a token may attend to
nothing (arXiv 2309.17453). FlexAttention does not know it. But it returns the log of the sum over all tokens, and the
sink only makes that sum larger: the result is scaled by the tokens' share of the new sum. Transformers does the same in
the dtype of the values, where bfloat16 makes that share wrong by up to 3 %. Here it is fp32.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations import flex_attention as flex

from automodel_trainer.models.kernels.flex_offsets import head_by_head, passes_32_bits, with_gradient_head_by_head


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it.

    Args:
        module: the layer. Without a block mask its modeling file's own function attends.
        query: `[b, h, s, d]`.
        key, value: `[b, h_kv, s, d]`.
        attention_mask: a block mask, or one of `[b, 1, s, s]`.

    Returns:
        out `[b, s, h, d]`, and None, or the eager function's weights.
    """
    if not isinstance(attention_mask, BlockMask):
        eager = sys.modules[module.__class__.__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    return _in_blocks(module, query, key, value, attention_mask, **kwargs), None


def _in_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    grouped = groups & (groups - 1) == 0  # the kernel wants a power of two
    if not grouped:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    far = passes_32_bits(query, key, value)
    if far:
        query, key, value = head_by_head(query), head_by_head(key), head_by_head(value)
    found: Any = flex.compile_friendly_flex_attention(
        query,
        key,
        value,
        training=module.training,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        enable_gqa=grouped,
        scale=scaling,
        **flex.get_flex_attention_lse_kwargs(True),
    )
    out: Tensor = with_gradient_head_by_head(found[0]) if far else found[0]
    if s_aux is not None:
        share = torch.sigmoid(found[1].lse - s_aux.float().view(1, heads, 1))  # of exp(lse) in exp(lse) + exp(sink)
        out = (out * share[..., None]).to(query.dtype)
    return out.transpose(1, 2).contiguous()
