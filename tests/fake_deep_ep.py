"""DeepEP's V1 `Buffer` over gloo: what its dispatch and combine give and take, by plain collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


class _Config:
    def get_nvl_buffer_size_hint(self, width: int, ranks: int) -> int:
        return width * ranks


class Buffer:
    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        assert num_nvl_bytes > 0
        assert num_rdma_bytes == 0
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    @staticmethod
    def get_dispatch_config(ranks: int) -> _Config:
        return _Config()

    @staticmethod
    def get_combine_config(ranks: int) -> _Config:
        return _Config()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> Any:
        local = num_experts // self.ranks
        inside = torch.stack([(topk_idx // local == rank).any(1) for rank in range(self.ranks)], 1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return inside.sum(0), None, per_expert, inside, None

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> Any:
        assert x.is_contiguous()
        if handle is not None:
            return self._send(x, handle[0]), None, None, None, None, None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        local = len(num_tokens_per_expert) // self.ranks
        numbers, weights = self._send(topk_idx, is_token_in_rank), self._send(topk_weights, is_token_in_rank)
        here = numbers // local == self.rank
        numbers, weights = torch.where(here, numbers % local, -1), torch.where(here, weights, 0.0)
        counts = [int((numbers == expert).sum()) for expert in range(local)]
        return self._send(x, is_token_in_rank), numbers, weights, counts, (is_token_in_rank, len(x)), None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> Any:
        assert x.is_contiguous()
        total = self._return(x, *handle)
        return total, None if topk_weights is None else self._return(topk_weights, *handle), None

    def _send(self, x: Tensor, inside: Tensor) -> Tensor:
        return torch.cat(self._exchange([x[inside[:, rank]] for rank in range(self.ranks)]))

    def _return(self, x: Tensor, inside: Tensor, count: int) -> Tensor:
        sizes = self._exchange([torch.zeros(int(n)) for n in inside.sum(0)])  # what each rank sent here
        parts = self._exchange(list(x.split([len(s) for s in sizes])))
        total = x.new_zeros(count, x.shape[1])
        for rank, part in enumerate(parts):
            total[inside[:, rank]] += part
        return total

    def _exchange(self, parts: list[Tensor]) -> list[Tensor]:
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, parts, group=self.group)
        return [sent[self.rank] for sent in everyone]
