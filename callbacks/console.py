"""What callbacks print: blocks that are framed in a terminal and plain text in a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning.pytorch as pl
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Row = tuple[str, str]


def is_terminal() -> bool:
    """Whether what is printed goes to a terminal rather than to a file or a pipe."""
    return sys.stdout.isatty()


def show(trainer: pl.Trainer, text: str) -> None:
    """Print on rank 0, above whatever progress bar there is."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    printer = bar.print if bar is not None and getattr(bar, "is_enabled", False) else print
    printer(text)


def block(title: str, rows: Sequence[Row], terminal: bool | None = None, width: int | None = None) -> str:
    """Names and what is to be said of them, aligned under a title. Marks (⚠) stand out in a terminal.

    Args:
        title: one or two words.
        rows: name and text of each line; long texts are wrapped in a terminal.
        terminal: framed and coloured, or plain; None finds out.
        width: of the frame; None takes the terminal's, up to 120 columns.
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
