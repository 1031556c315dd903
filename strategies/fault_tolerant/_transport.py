"""How a late group is handed the state of another: torchft's HTTP server, which is told the state later."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchft.checkpointing._rwlock import RWLock
from torchft.checkpointing.http_transport import HTTPTransport


class Transport(HTTPTransport):  # type: ignore[misc]
    """Serves the state of this rank to the same rank of late groups.

    torchft asks for the state in a thread, of only those ranks that serve it: with three groups, late ranks are spread
    over the others. Making the state is collective. So a request is only noted here, and `give` answers it.

    Args:
        timeout: how long a late rank waits for a part of the state, and the others for the late rank.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout, num_chunks=0)
        self._server.RequestHandlerClass.log_message = lambda *_: None  # it prints a line for each request
        self._request: tuple[list[int], int, dict[str, Any], timedelta] | None = None

    @property
    def asked(self) -> bool:
        """Whether this rank is to serve the state before the next step."""
        return self._request is not None

    def forget_request(self) -> None:
        """A new quorum begins."""
        self._request = None

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        """Note what torchft asks for. Late ranks wait until it is there."""
        self._request = dst_ranks, step, state_dict, timeout

    def give(self, state: dict[str, Any]) -> None:
        """Serve `state`. On a CPU its tensors must be copies: training goes on while it is read."""
        assert self._request is not None
        ranks, step, around, timeout = self._request
        self._request = None
        super().send_checkpoint(ranks, step, {**around, "user": dict.fromkeys(around["user"], state)}, timeout)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Read the state of another group."""
        begun = time.monotonic()
        state = super().recv_checkpoint(src_rank, metadata, step, timeout)
        seconds = time.monotonic() - begun
        if seconds > timeout.total_seconds():
            rank_zero_warn(
                f"This replica group took {seconds:.0f} s to get its state, and the others wait only "
                f"replica_timeout={timeout.total_seconds():g} s for it. Raise replica_timeout in all groups."
            )
        return state

    def disallow_checkpoint(self) -> None:
        """Serve nothing until `give`. torchft's own waits here until slow readers are done, or raises an error."""
        if not self._disallowed:
            self._checkpoint_lock = RWLock(timeout=self._timeout.total_seconds())  # readers keep the one they hold
            self._state_dict = self._spec = self._chunks = None  # and what they read
        super().disallow_checkpoint()
