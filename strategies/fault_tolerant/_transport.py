"""How a late group is handed the state of another: a message by torchft's HTTP server, and tensors by process group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torchft.checkpointing._rwlock import RWLock
from torchft.checkpointing.http_transport import HTTPTransport
from torchft.process_group import ProcessGroup

_PART = 2**28  # bytes of a tensor that are sent at once


class Transport(HTTPTransport):  # type: ignore[misc]
    """Hands the state of this rank to the same rank of late groups.

    torchft asks for the state in a thread, of only those ranks that serve it: with three groups, late ranks are spread
    over the others. Making the state is collective. So a request is only noted here, and `give` answers it. The message
    goes by HTTP, because torchft waits for it in that thread. Tensors follow in the main thread, as in torchft's
    `PGTransport`: from device to device, with no copy in the memory of a host.

    Args:
        timeout: how long a late rank waits for the message.

    Attributes:
        readers: places of the late groups that were given the message in this quorum.
        source: the place of the group that gave it to this one; None: this one is not late.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout, num_chunks=0)
        self._server.RequestHandlerClass.log_message = lambda *_: None  # it prints a line for each request
        self._request: tuple[list[int], int, dict[str, Any], timedelta] | None = None
        self.readers: list[int] = []
        self.source: int | None = None

    @property
    def asked(self) -> bool:
        """Whether this rank is to serve the state before the next step."""
        return self._request is not None

    def begin_quorum(self) -> None:
        """Forget who asked before."""
        self._request, self.readers, self.source = None, [], None

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        """Note what torchft asks for. Late ranks wait until it is there."""
        self._request = dst_ranks, step, state_dict, timeout

    def give(self, message: dict[str, Any]) -> None:
        """Serve a message. On a CPU its tensors must be copies: training goes on while it is read."""
        assert self._request is not None
        self.readers, step, around, timeout = self._request
        self._request = None
        super().send_checkpoint(self.readers, step, {**around, "user": dict.fromkeys(around["user"], message)}, timeout)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Read the message of another group."""
        self.source = src_rank
        return super().recv_checkpoint(src_rank, metadata, step, timeout)

    def disallow_checkpoint(self) -> None:
        """Serve nothing until `give`. torchft's own waits here until slow readers are done, or raises an error."""
        if not self._disallowed:
            self._checkpoint_lock = RWLock(timeout=self._timeout.total_seconds())  # readers keep the one they hold
            self._state_dict = self._spec = self._chunks = None  # and what they read
        super().disallow_checkpoint()


def send(group: ProcessGroup, tensors: Iterable[Tensor], readers: Iterable[int]) -> None:
    """Send tensors to other groups, which `receive` them in this order."""
    for tensor in tensors:
        for part in _parts(tensor.contiguous()):
            for work in [group.send([part], reader, 0) for reader in readers]:
                work.wait()


def receive(group: ProcessGroup, tensor: Tensor, source: int) -> None:
    """Fill a contiguous tensor."""
    for part in _parts(tensor):
        group.recv([part], source, 0).wait()


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Views of a contiguous tensor of any dtype as bytes."""
    if tensor.numel():
        yield from tensor.view(-1).view(torch.uint8).split(_PART)
