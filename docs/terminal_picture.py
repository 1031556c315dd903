"""Draw a recorded terminal as a picture: `script -qc "amt fit …" log; python docs/terminal_picture.py log out.svg`."""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-KSTfhlsu]")  # cursor and erase sequences; colours (…m) stay
DROP = ("Script ", ".venv/lib", "Seed set", "GPU available", "TPU available", "/work", "e.py", "`isinstance", "INFO:")


def lines_of(log: str) -> list[str]:
    """What stood on each line in the end: a live line is its last state."""
    states = (CONTROL.sub("", line).rstrip().split("\r")[-1] for line in log.replace("\r\n", "\n").split("\n"))
    said = (line for line in states if not Text.from_ansi(line).plain.strip().startswith(DROP))
    kept = [line for line, _ in groupby(said)]  # of several empty lines one
    # A live line is written again below every message that scrolls past it: keep its last writing only.
    live = re.compile(r"^(step \d+/\d+|validation \d+/\d+)")
    return [
        line
        for index, line in enumerate(kept)
        if not live.match(Text.from_ansi(line).plain)
        or not any(live.match(Text.from_ansi(later).plain) for later in kept[index + 1 :])
    ]


def main(log: str, out: str, title: str = "make quickstart") -> None:
    console = Console(record=True, width=84, file=open("/dev/null", "w"))  # noqa: SIM115
    for line in lines_of(Path(log).read_text(errors="replace")):
        console.print(Text.from_ansi(line))
    console.save_svg(out, title=title)


if __name__ == "__main__":
    main(*sys.argv[1:])
