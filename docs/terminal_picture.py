"""Draw a recorded terminal as a picture one screen high.

script -qc "make quickstart" log; python docs/terminal_picture.py log docs/quickstart.svg
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-KSTfhlsu]")  # cursor and erase sequences; colours (…m) stay
DROP = ("Script ", ".venv/lib", "Seed set", "GPU available", "TPU available", "/work", "e.py", "`isinstance", "INFO:")
LIVE = re.compile(r"^(step \d+/\d+|validation \d+/\d+)")


def lines_of(log: str) -> list[str]:
    """What stood on each line in the end: a live line is its last state."""
    states = (CONTROL.sub("", line).rstrip().split("\r")[-1] for line in log.replace("\r\n", "\n").split("\n"))
    said = (line for line in states if not plain(line).strip().startswith(DROP))
    kept = [line for line, _ in groupby(said)]  # of several empty lines one
    # A live line is written again below every message that scrolls past it: keep its last writing only.
    return [
        line
        for index, line in enumerate(kept)
        if not LIVE.match(plain(line)) or not any(LIVE.match(plain(later)) for later in kept[index + 1 :])
    ]


def shortened(lines: list[str], keep: dict[str, tuple[int, int]]) -> list[str]:
    """The boxes that `keep` names, each with the lines from one number to another; of the rest what stands outside.

    Args:
        lines: of a terminal.
        keep: title of a box -> first and last line of it that are shown, from 0 inside the box.
    """
    found: list[str] = []
    box: list[str] = []
    for line in lines:
        text = plain(line)
        if text.startswith("╭"):
            box = [line]
        elif box:
            box.append(line)
            if text.startswith("╰"):
                found += _box(box, keep)
                box = []
        elif re.match(r"validation (before|after)|step", text):
            found.append(line)
    return found


def _box(box: list[str], keep: dict[str, tuple[int, int]]) -> list[str]:
    title = plain(box[0]).strip("╭─╮ ")
    if title not in keep:
        return []
    first, last = keep[title]
    inside = box[1:-1]
    return [box[0], *inside[first:last], box[-1]]


def plain(line: str) -> str:
    """A line without its colours."""
    return Text.from_ansi(line).plain


QUICKSTART = {"first batch": (5, 18), "ledger": (0, 6), "sample answers": (1, 7), "training finished": (0, 3)}
GREY, WHITE = (139, 148, 163), (230, 233, 238)
DIM = ((214, 92, 92), (46, 168, 98), (201, 138, 18), (88, 140, 220), (170, 120, 200), (80, 170, 190))
BRIGHT = ((240, 120, 120), (120, 220, 160), (247, 181, 56), (130, 180, 250), (200, 160, 230), (120, 210, 230))
THEME = TerminalTheme((22, 27, 34), WHITE, [(22, 27, 34), *DIM, GREY], [(74, 82, 96), *BRIGHT, WHITE])


def main(log: str, out: str, title: str = "make quickstart") -> None:
    """Draw what is worth a screen."""
    console = Console(record=True, width=82, file=open("/dev/null", "w"))  # noqa: SIM115
    for line in shortened(lines_of(Path(log).read_text(errors="replace")), QUICKSTART):
        console.print(Text.from_ansi(line))
    console.save_svg(out, title=title, theme=THEME)


if __name__ == "__main__":
    main(*sys.argv[1:])
