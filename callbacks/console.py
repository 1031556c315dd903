"""Terminal output of callbacks: blocks with a frame in a terminal and plain text in a file, and a live line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from rich import box
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from automodel_trainer.callbacks.notebook import Html, display, in_kernel
from automodel_trainer.nn.html_table import html_table

Row = tuple[str, str]
"""The name and the text of one line of a block."""


def is_terminal() -> bool:
    """Whether standard output is a terminal, and not a file or a pipe."""
    return sys.stdout.isatty()


def show(trainer: pl.Trainer, text: str) -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if not trainer.is_global_zero:
        return
    bar = getattr(trainer, "progress_bar_callback", None)
    printer = bar.print if bar is not None and getattr(bar, "is_enabled", False) else print
    printer(text)


def show_rich(trainer: pl.Trainer, write: Callable[[Console], object]) -> None:
    """Print on rank 0 what `write` writes to a rich console. Written directly, it would break the progress line."""
    console = Console()
    with console.capture() as captured:
        write(console)
    show(trainer, captured.get().rstrip("\n"))


def show_block(trainer: pl.Trainer, title: str, rows: Sequence[Row]) -> None:
    """Show names and texts on rank 0: as a block of text, and in a notebook as a table."""
    if trainer.is_global_zero and in_kernel():
        display(Html(html_table(title, rows), block(title, rows, terminal=False)))
    else:
        show(trainer, block(title, rows))


class LiveLine:
    """The last line of the terminal. It is redrawn in place, and all other output scrolls above it.

    Args:
        console: the rich console to draw on. None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._live = Live(console=console or Console(), auto_refresh=False, transient=True)
        before = (sys.stdout, sys.stderr)
        self._live.start()  # replaces stdout and stderr by its own streams
        self._handlers = [(handler, handler.stream) for handler in _handlers_writing_to(before)]
        for handler, _ in self._handlers:
            handler.setStream(sys.stderr)

    @property
    def width(self) -> int:
        """Width of the terminal in columns."""
        return self._live.console.width

    def draw(self, text: str) -> None:
        """Replace the line by `text`."""
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        """Remove the line and restore the streams."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._live.stop()


def _handlers_writing_to(streams: Sequence[Any]) -> list[logging.StreamHandler[Any]]:
    """All log handlers that write to one of the streams. They keep their stream when `sys.stderr` is replaced."""
    loggers = [
        logging.getLogger(),
        *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)),
    ]
    handlers = {id(h): h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)}
    return [handler for handler in handlers.values() if any(handler.stream is stream for stream in streams)]


def block(title: str, rows: Sequence[Row], terminal: bool | None = None, width: int | None = None) -> str:
    """Format names and texts as aligned lines under a title. In a terminal, texts that begin with ⚠ are yellow.

    Args:
        title: one or two words.
        rows: name and text of each line. Long texts are wrapped in a terminal.
        terminal: True: with frame and colors. False: plain text. None: detect.
        width: width of the frame in columns, at most 120. None: the terminal's.
    """
    if not (is_terminal() if terminal is None else terminal):
        indent = max((len(name) for name, _ in rows), default=0)
        return "\n".join([title, *(f"  {name:<{indent}}  {text}" for name, text in rows)])
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(name, Text(text, style="yellow" if text.startswith("⚠") else ""))
    console = Console(force_terminal=True, width=width)
    console.width = min(console.width, 120)
    with console.capture() as captured:
        frame = Panel(grid, title=Text(title, style="bold"), title_align="left", box=box.ROUNDED, border_style="dim")
        console.print(frame)
    return captured.get().rstrip("\n")
