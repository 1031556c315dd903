"""DeepEP (V1 `Buffer`; the wheel tokenspeed-deepep 1.2.1.post20251110 on torch 2.11): tokens travel over NVLink.

`Buffer.dispatch` sends a token once to each rank that holds some of its experts, and `Buffer.combine` adds up what
comes back. Each is the gradient of the other, so no other kernel is needed.
"""

from __future__ import annotations

import ctypes
import glob
import socket
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from automodel_trainer.distributed.phase import during_place
from automodel_trainer.models.kernels.dispatch import Arrived, Dispatcher
from automodel_trainer.models.kernels.library import KernelLibrary, Offer

_METHODS = ("get_dispatch_layout", "dispatch", "combine", "get_dispatch_config", "get_combine_config")


class DeepEP(KernelLibrary):
    """Dispatch and combine in fused kernels, for the GPUs of one host."""

    name = "deepep"
    title = "DeepEP"
    requirement = "DeepEP with the V1 Buffer, under the name deep_ep (docs/kernels.md says which package)"
    offers = {"dispatch": Offer(dtypes=(torch.bfloat16,), cuts_graph=True)}

    def load(self) -> Any:
        """The package."""
        return _load()

    def dispatch(self, group: ProcessGroup, local: int) -> Dispatcher | str:
        """See `KernelLibrary.dispatch`."""
        if (obstacle := self.peer_obstacle(group)) is not None:
            return obstacle
        return DeepEPDispatcher(_buffers(group), local)

    def peer_obstacle(self, group: ProcessGroup) -> str | None:
        """Why the ranks of `group` cannot write into each other's memory; the same on all of them. Collective."""
        own = (socket.gethostname(), torch.cuda.current_device())
        ranks: list[Any] = [None] * group.size()
        dist.all_gather_object(ranks, own, group=group)
        hosts = sorted({host for host, _ in ranks})
        mine = [] if len(hosts) > 1 else [d for _, d in ranks if d != own[1] and not _reaches(own[1], d)]
        blocked: list[Any] = [None] * group.size()
        dist.all_gather_object(blocked, [(own[1], device) for device in mine], group=group)
        if len(hosts) > 1:
            return f"the ep ranks are on {len(hosts)} hosts ({', '.join(hosts[:3])}), and its buffers are of one"
        pairs = [pair for some in blocked for pair in some]
        if pairs:
            return "GPU {} cannot reach the memory of GPU {} (no NVLink peers)".format(*pairs[0])
        return None


def _reaches(device: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(device, other)


@cache
def _load() -> Any:
    _preload()
    package = import_module("deep_ep")
    buffer = getattr(package, "Buffer", None)
    if missing := [name for name in _METHODS if not hasattr(buffer, name)]:
        version = getattr(package, "__version__", "unknown")
        raise ImportError(f"deep_ep {version} has no V1 Buffer: Buffer.{missing[0]} is missing")
    return package


def _preload() -> None:
    """Load what the package's library expects to be in the process. What is missing shows when it is imported."""
    for path in ("libcuda.so.1", *_nvshmem()):
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue


def _nvshmem() -> Iterator[str]:
    """The host library of NVSHMEM, of the package nvidia-nvshmem-cu13."""
    try:
        folders = list(import_module("nvidia").__path__)
    except ImportError:
        return
    for folder in folders:
        yield from sorted(glob.glob(f"{folder}/nvshmem/lib/libnvshmem_host.so*"))[:1]


class _Buffers:
    """The buffer that all layers of a model share, made when the first token is sent, and again for wider tokens."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._width, self._buffer = 0, None

    def of_width(self, width: int) -> Any:
        """The package's buffer for tokens of `width` bytes. Collective if it is made."""
        if self._buffer is None or width > self._width:
            kind, ranks = _load().Buffer, self.group.size()
            configs = (kind.get_dispatch_config(ranks), kind.get_combine_config(ranks))
            size = max(config.get_nvl_buffer_size_hint(width, ranks) for config in configs)
            self._width, self._buffer = width, kind(self.group, size, 0)
        return self._buffer


@cache
def _buffers(group: ProcessGroup) -> _Buffers:
    return _Buffers(group)


class _Route(NamedTuple):
    buffer: Any
    handle: Any


class DeepEPDispatcher:
    """A `Dispatcher` by DeepEP.

    Args:
        buffers: of the ep ranks.
        local: the number of experts that each of them holds.
    """

    def __init__(self, buffers: _Buffers, local: int) -> None:
        self.buffers, self.local = buffers, local

    def dispatch(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Arrived:
        """See `Dispatcher.dispatch`."""
        if hidden.dtype not in DeepEP.offers["dispatch"].dtypes:
            raise ValueError(
                f"kernels dispatch='deepep' sends tokens in bf16, and these are {hidden.dtype}. Set precision='bf16', "
                "or dispatch='all_to_all'."
            )
        buffer = self.buffers.of_width(hidden.shape[1] * hidden.element_size())
        ranks = self.buffers.group.size()
        sent = _Dispatch.apply(hidden, weights.float(), experts, buffer, self.local, ranks)
        rows, numbers, chosen, choices, handle = sent
        return Arrived(rows, numbers, chosen.to(weights.dtype), choices, _Route(buffer, handle))

    def combine(self, output: Tensor, route: _Route) -> Tensor:
        """See `Dispatcher.combine`."""
        return _Combine.apply(output, route)


class _Dispatch(Function):
    """Tokens `[n, h]` and weights `[n, k]` to those that arrive, `[m, h]` and `[m, k]`. The backward is a combine."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, experts: Tensor, buffer: Any, local: int, ranks: int) -> Any:
        numbers = experts.to(getattr(_load(), "topk_idx_t", torch.int64))
        per_rank, per_rdma_rank, per_expert, inside, _ = buffer.get_dispatch_layout(numbers, local * ranks)
        rows, arrived, chosen, choices, handle, _ = buffer.dispatch(
            hidden.contiguous(),
            topk_idx=numbers,
            topk_weights=weights.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=inside,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.here = arrived >= 0
        arrived = torch.where(ctx.here, arrived, local).long()
        ctx.mark_non_differentiable(arrived)
        return rows, arrived, chosen, sum(choices), handle

    @staticmethod
    def backward(ctx: Any, rows: Tensor, arrived: Any, chosen: Tensor, choices: Any, handle: Any) -> Any:
        with during_place("exchange of tokens' gradients"):
            own = (chosen * ctx.here).contiguous()  # the other ranks have the gradients of the other choices
            hidden, weights, _ = ctx.buffer.combine(rows.contiguous(), ctx.handle, topk_weights=own)
        return hidden, weights, None, None, None, None


class _Combine(Function):
    """Results `[m, h]` to sums `[n, h]`. The backward is a dispatch along the same route."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        total, _, _ = route.buffer.combine(output.contiguous(), route.handle)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with during_place("exchange of tokens' gradients"):
            rows, *_ = ctx.route.buffer.dispatch(grad.contiguous(), handle=ctx.route.handle)
        return rows, None


LIBRARIES = (DeepEP(),)
