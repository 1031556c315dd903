"""Write the tables of docs/resume.md: the checkpoint of every layout, resumed under every other.

python docs/resume_matrix.py                                  # about twenty minutes on two cores
python docs/resume_matrix.py --folder F --minutes 5           # stops early with exit code 3; run it again to continue
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests

from tests.checkpoint.resume import LAYOUTS, checkpoint, difference, train
from tests.pool import RankPool

START, END = "<!-- table -->", "<!-- end of table -->"
UNFINISHED = 3
KINDS = {
    "packed": "packed chats",
    "workers": "packed chats, built ahead by two workers",
    "stream": "streamed text, read ahead by a worker",
}
PAIRS = [("fsdp2 ×2", "fsdp2 ×2"), ("fsdp2 ×2", "single"), ("single", "fsdp2 ×4"), ("hsdp 2×2", "tp ×2")]


class Cells:
    """The cells that are made, kept in a file beside the runs that they are made from.

    Args:
        end: of the time, by `time.monotonic`; SystemExit is raised when a cell is asked for after it.
    """

    def __init__(self, folder: Path, end: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.end, self.file = folder, end, folder / "cells.json"
        self.made: dict[str, str] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.pool = RankPool()

    def get(self, first: str, second: str, lora: bool, kind: str) -> str:
        """The largest difference from the run that was not stopped, or that it fails."""
        key = f"{first} -> {second}, {'LoRA' if lora else 'full'}, {kind}"
        if key not in self.made:
            if time.monotonic() > self.end:
                self.pool.close()
                raise SystemExit(UNFINISHED)
            self.made[key] = self._make(first, second, lora, kind)
            self.file.write_text(json.dumps(self.made, indent=0))
            print(f"{key}: {self.made[key]}", flush=True)
        return self.made[key]

    def _make(self, first: str, second: str, lora: bool, kind: str) -> str:
        root = self.folder / f"{first}-{lora}-{kind}"
        whole = self._whole(root, first, lora, kind)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            try:
                rest = plain(train(self.pool, Path(place), second, lora, checkpoint(root), kind))
                worst = difference(rest, whole, same_layout=first == second)
            except (AssertionError, TimeoutError) as error:
                print(error, file=sys.stderr)
                return "**fails**"
        return "0" if worst == 0 else f"{worst:.0e}"

    def _whole(self, root: Path, layout: str, lora: bool, kind: str) -> dict[str, Any]:
        """The run that is not stopped, and has left the checkpoint to go on from."""
        noted = root / "whole.json"
        if not noted.is_file():
            noted.write_text(json.dumps(train(self.pool, root, layout, lora, kind=kind)))
        return plain(json.loads(noted.read_text()))


def plain(run: dict[str, Any]) -> dict[str, Any]:
    """Lists for tuples, as JSON has them."""
    return json.loads(json.dumps(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep results here, and continue from those that are there")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, when a cell is done")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    page, end = Path(__file__).with_name("resume.md"), time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        os.environ["AMT_CACHE"] = str(folder / "cache")
        cells = Cells(folder, end)
        lines: list[str] = []
        for lora in (False, True):
            title = "LoRA" if lora else "All parameters"
            lines += [f"**{title}** (row: saved under; column: resumed under)", "", *table(cells, lora), ""]
        lines += ["**Data** (all parameters)", "", *data_table(cells)]
        cells.pool.close()
    failed = sum(line.count("fails") for line in lines)
    before, _, rest = page.read_text().partition(START)
    page.write_text(before + START + "\n" + "\n".join(lines).rstrip() + "\n" + END + rest.partition(END)[2])
    raise SystemExit(f"{failed} pair(s) fail" if failed else 0)


def table(cells: Cells, lora: bool) -> list[str]:
    rows = {first: [cells.get(first, second, lora, "packed") for second in LAYOUTS] for first in LAYOUTS}
    return [*head("", list(LAYOUTS)), *(f"| **{first}** | " + " | ".join(row) + " |" for first, row in rows.items())]


def data_table(cells: Cells) -> list[str]:
    lines = head("", [f"{first} → {second}" for first, second in PAIRS])
    for kind, name in KINDS.items():
        row = [cells.get(first, second, False, kind) for first, second in PAIRS]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return lines


def head(corner: str, columns: list[str]) -> list[str]:
    return [f"| {corner} | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]


if __name__ == "__main__":
    main()
