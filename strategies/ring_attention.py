"""Ring attention: queries stay, keys and values travel around the ranks that the sequence is split over.

Source: Ring Attention, arXiv 2310.01889; the merge of partial results is that of Flash Attention (arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SCORES = 2**26  # elements of a block of attention scores that may exist at a time


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    group: Any,
    *,
    causal: bool = True,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """Exact attention over the shards of `group`, each rank holding chunks r and 2n−1−r of the sequence.

    Args:
        query: `[b, h, s/n, d]`.
        key, value: `[b, h_kv, s/n, d]`, with h a multiple of h_kv.
        mask: bool `[b, 1, s/n, s]`, True where a query may look, columns in rank-major order; None: `causal` says it.
        causal: without a mask, a token sees those before it; else it sees all.
        scaling: of the scores; None: 1/√d.

    Returns:
        `[b, s/n, h, d]`.

    Raises:
        ValueError: something that ring attention does not do.
    """
    for name, given in (("dropout", dropout), ("softcap", softcap), ("s_aux", s_aux), ("position_bias", position_bias)):
        if given is not None and (isinstance(given, Tensor) or given != 0):
            raise ValueError(f"Ring attention does not do {name} in attention. Set cp_attention='ulysses'.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _Ring.apply(query, key, value, mask, group, causal, scaling)
    return out.transpose(1, 2).contiguous()


@dataclass
class _Block:
    """Which of this rank's queries look at which keys of another's shard, and how."""

    queries: slice
    keys: slice
    mask: Tensor | None
    causal: bool = False


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group: Any, causal: bool, scale: float
    ) -> Tensor:
        b, h, s, _ = query.shape
        out = torch.zeros(b, h, s, value.shape[-1], dtype=_wide(query.dtype), device=query.device)
        lse = torch.full((b, h, s), float("-inf"), dtype=_wide(query.dtype), device=query.device)
        k, v = key.contiguous(), value.contiguous()
        size = dist.get_world_size(group)
        for step in range(size):
            arriving = _pass_on([k, v], group) if step < size - 1 else None
            block = _block(s, step, mask, group, causal)
            if block is not None:
                rows, columns = block.queries, block.keys
                part = _attend(query[:, :, rows], k[:, :, columns], v[:, :, columns], block, scale)
                _merge(out[:, :, rows], lse[:, :, rows], *part)
            if arriving is not None:
                k, v = arriving()
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, result, lse)
        ctx.group, ctx.causal, ctx.scale = group, causal, scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse = ctx.saved_tensors
        grad, group = gradients[0], ctx.group
        k, v = key.contiguous(), value.contiguous()
        dq, dk, dv = (
            torch.zeros_like(t, dtype=_wide(t.dtype), memory_format=torch.contiguous_format) for t in (query, k, v)
        )
        delta = (_widen(grad) * _widen(out)).sum(-1)
        size = dist.get_world_size(group)
        for step in range(size):
            arriving = _pass_on([k, v], group) if step < size - 1 else None
            block = _block(query.shape[2], step, mask, group, ctx.causal)
            if block is not None:
                rows, columns = block.queries, block.keys
                queries = (query[:, :, rows], grad[:, :, rows], lse[:, :, rows], delta[:, :, rows], dq[:, :, rows])
                keys = (k[:, :, columns], v[:, :, columns], dk[:, :, columns], dv[:, :, columns])
                _attend_backward(*queries, *keys, block, ctx.scale)
            if arriving is not None:
                k, v = arriving()
            dk, dv = _pass_on([dk, dv], group)()  # sums travel with their keys, and one hop more: home
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None, None, None


def _block(length: int, step: int, mask: Tensor | None, group: Any, causal: bool) -> _Block | None:
    """What this rank computes with the shard that arrives at `step`; None for nothing."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    origin = (rank - step) % size
    everything = slice(None)
    if mask is not None:
        return _Block(everything, everything, mask[..., origin * length : (origin + 1) * length])
    if not causal or origin == rank:  # within a shard the order is that of the sequence
        return _Block(everything, everything, None, causal)
    half = length // 2
    if origin < rank:  # its early chunk lies before both of ours, its late chunk behind both
        return _Block(everything, slice(None, half), None)
    return _Block(slice(half, None), everything, None)  # both of its chunks lie between our two


def _pass_on(tensors: list[Tensor], group: Any) -> Callable[[], list[Tensor]]:
    """Start sending to the next rank; the returned function waits for what the previous rank sent."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    received = [torch.empty_like(tensor) for tensor in tensors]
    after, before = (rank + 1) % size, (rank - 1) % size
    sends = [dist.P2POp(dist.isend, tensor, group=group, group_peer=after) for tensor in tensors]
    receives = [dist.P2POp(dist.irecv, tensor, group=group, group_peer=before) for tensor in received]
    works = dist.batch_isend_irecv([*sends, *receives])

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        return received

    return wait


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's result to the running one, in place: both are averages under the softmax of their own keys."""
    total = torch.logaddexp(lse, part_lse)
    seen = total.clamp(min=torch.finfo(total.dtype).min)  # a row that has seen no key yet: 0 · exp(−inf), not NaN
    out.mul_((lse - seen).exp().unsqueeze(-1)).add_(part * (part_lse - seen).exp().unsqueeze(-1))
    lse.copy_(total)


def _attend(q: Tensor, k: Tensor, v: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over one block: out fp32 `[b, h, q, d]` and the log of the softmax's sum `[b, h, q]`."""
    outs, sums = [], []
    for rows in _tiles(q, k):
        scores = _scores(q[:, :, rows], k, block, rows, scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
        outs.append(_ungroup(weights @ _widen(v).unsqueeze(2)))
        sums.append(lse.flatten(1, 2))
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _attend_backward(
    q: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    block: _Block,
    scale: float,
) -> None:
    """Add one block's part of the gradients to `dq`, `dk`, `dv`; `lse` and `delta` are those over all keys."""
    heads = k.shape[1]
    key, value = _widen(k).unsqueeze(2), _widen(v).unsqueeze(2)
    for rows in _tiles(q, k):
        scores = _scores(q[:, :, rows], k, block, rows, scale)
        total = _group(lse[:, :, rows], heads).clamp(min=torch.finfo(lse.dtype).min)
        weights = (scores - total.unsqueeze(-1)).exp()
        g = _group(_widen(grad[:, :, rows]), heads)
        ds = weights * (g @ value.mT - _group(delta[:, :, rows], heads).unsqueeze(-1)) * scale
        dv += (weights.mT @ g).sum(2)
        dk += (ds.mT @ _group(_widen(q[:, :, rows]), heads)).sum(2)
        dq[:, :, rows] += _ungroup(ds @ key)


def _scores(q: Tensor, k: Tensor, block: _Block, rows: slice, scale: float) -> Tensor:
    """fp32 `[b, h_kv, h / h_kv, q, k]`, −inf where a query may not look; `q` holds `rows` of the block's queries."""
    scores = _group(_widen(q), k.shape[1]) @ _widen(k).unsqueeze(2).mT * scale
    if block.mask is not None:
        return scores.masked_fill(~block.mask[:, :, rows].unsqueeze(2), float("-inf"))
    if block.causal:
        query = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        return scores.masked_fill(query < torch.arange(k.shape[2], device=q.device), float("-inf"))
    return scores


def _tiles(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Ranges of queries whose scores fit in memory."""
    length = q.shape[2]
    size = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _group(tensor: Tensor, heads: int) -> Tensor:
    """`[b, h, …]` to `[b, heads, h / heads, …]`: the query heads that share a key head."""
    return tensor.unflatten(1, (heads, -1))


def _ungroup(tensor: Tensor) -> Tensor:
    return tensor.flatten(1, 2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor.dtype))
