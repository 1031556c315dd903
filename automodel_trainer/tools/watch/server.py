"""`amt watch`: look at a run in a browser, while it goes on or when it is over; or at two, one over the other.

amt watch runs/sft
amt watch runs/a runs/b
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from automodel_trainer.tools.watch.page import page, trouble
from automodel_trainer.tools.watch.run import read_run

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost")  # other names in a request mean that a page of somebody else asks
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Server(ThreadingHTTPServer):
    """Serves the page of one run on the loopback address.

    Args:
        folder: of the run.
        port: to listen on; 0 takes a free one.
        beside: the folder of another run, which is drawn over it.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, beside: Path | None = None) -> None:
        super().__init__((ADDRESS, port), _Handler)
        self.folder, self.beside = folder, beside

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """Answer with the page or a picture. The folder is read anew each time."""
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in HOSTS:
            self._answer(403, "text/plain", b"This address serves 127.0.0.1 and localhost only.")
            return
        try:
            run = read_run(self.server.folder)
            if self.path == "/":
                beside = read_run(self.server.beside) if self.server.beside is not None else None
                self._answer(200, "text/html; charset=utf-8", page(run, beside).encode())
                return
            picture = re.fullmatch(r"/picture/(\d{1,3})", self.path)
            if picture and int(picture[1]) < len(run.pictures):
                self._answer(200, "image/svg+xml", run.pictures[int(picture[1])].read_bytes())
            else:
                self._answer(404, "text/plain", b"There is no such page.")
        except (ValueError, OSError) as error:
            self._answer(500, "text/html; charset=utf-8", trouble(str(error)).encode())  # it may be there again

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        policy = POLICY if kind.startswith("text/html") else "default-src 'none'; style-src 'unsafe-inline'; sandbox"
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": policy}
        headers |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing about requests."""


def main(argv: Sequence[str]) -> None:
    """The command line: serve until Ctrl-C.

    Raises:
        ValueError: the folder is none of a run, or the port is taken.
    """
    parser = argparse.ArgumentParser(
        prog="amt watch",
        description="Look at a run in a browser: curves, memory, first batch, ledger, checkpoints. It only reads.",
    )
    parser.add_argument("run", type=Path, help="the run's default_root_dir")
    parser.add_argument("beside", type=Path, nargs="?", help="another run's, drawn over it")
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: a free one)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page to a file instead")
    args = parser.parse_args(list(argv))
    run = read_run(args.run)
    beside = read_run(args.beside) if args.beside is not None else None
    if args.html is not None:
        args.html.write_text(page(run, beside), encoding="utf-8")
        print(f"Page written to {args.html}.")
        return
    try:
        server = Server(args.run, args.port, args.beside)
    except OSError as error:
        raise ValueError(f"Port {args.port} cannot be used: {error.strerror}. Give another --port.") from error
    print(f"{args.run}: {server.url} (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
