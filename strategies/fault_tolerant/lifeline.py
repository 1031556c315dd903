"""Notice at once when a process of another group ends: the connection between the two breaks.

NCCL would wait for a lost peer until its timeout. Nothing is ever sent over these connections. A machine that loses its
power breaks none of them, so the timeout still counts.
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

Address = tuple[int, int]
"""An IPv4 address as a number, and a port; (0, 0) for none."""
NOWHERE: Address = (0, 0)
_PATIENCE = 5.0  # seconds for a connection
_LOOK = 0.2  # seconds between two looks whether the watch is over


class Lifeline:
    """Holds a connection to a process of each other group.

    Args:
        host: the name or address of this machine, as other groups know it.
        lost: called in a thread, once, when one of the connections breaks.
    """

    def __init__(self, host: str, lost: Callable[[], None]) -> None:
        self._lost = lost
        self._server = socket.create_server(("", 0))
        self._held: list[socket.socket] = []  # connections from others; they break when this process ends
        self._over = threading.Event()
        self.address = NOWHERE
        with suppress(OSError):  # a machine without IPv4
            self.address = int(ipaddress.IPv4Address(socket.gethostbyname(host))), self._server.getsockname()[1]
        threading.Thread(target=self._accept, name="lifeline", daemon=True).start()

    def watch(self, others: Sequence[Address]) -> None:
        """Hold connections to `others` in place of those before."""
        self._over.set()
        self._over = threading.Event()
        lines: list[socket.socket] = []
        for number, port in others:
            if (number, port) != NOWHERE:
                with suppress(OSError):  # what cannot be reached is not watched
                    host = str(ipaddress.IPv4Address(number))
                    lines.append(socket.create_connection((host, port), timeout=_PATIENCE))
        if lines:
            threading.Thread(target=self._look, args=(lines, self._over), name="lifeline", daemon=True).start()

    def cut(self) -> None:
        """End all connections."""
        self._over.set()
        for line in (self._server, *self._held):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the server was closed
            while True:
                line = self._server.accept()[0]
                gone = broken(self._held)  # those of earlier quorums
                for old in gone:
                    old.close()
                self._held = [*(old for old in self._held if old not in gone), line]

    def _look(self, lines: list[socket.socket], over: threading.Event) -> None:
        gone: list[socket.socket] = []
        while not over.is_set() and not gone:
            gone = broken(lines, _LOOK)
        if gone and not over.is_set():
            self._lost()
        for line in lines:
            line.close()


def broken(lines: Sequence[socket.socket], seconds: float = 0.0) -> list[socket.socket]:
    """The connections that have ended, after waiting for one at most so long. What can be read is an end."""
    with selectors.DefaultSelector() as selector:  # `select` takes no more than 1,024 open files
        for line in lines:
            selector.register(line, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(seconds)]  # type: ignore[misc]
