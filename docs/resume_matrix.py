"""Writes the tables of docs/resume.md: every layout's checkpoint, gone on from under every other.

python docs/resume_matrix.py            # some ten minutes on two cores
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests

from tests.checkpoint.resume import LAYOUTS, checkpoint, difference, train
from tests.pool import RankPool

START, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    warnings.simplefilter("ignore")
    page, pool, failed = Path(__file__).with_name("resume.md"), RankPool(), 0
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AMT_CACHE"] = str(Path(folder) / "cache")
        for lora in (False, True):
            title = "LoRA" if lora else "All parameters"
            lines += [
                f"**{title}** (row: saved under, column: gone on under)",
                "",
                *table(pool, Path(folder), lora),
                "",
            ]
        lines += ["**Data** (all parameters)", "", *data_table(pool, Path(folder))]
    pool.close()
    failed = sum(line.count("fails") for line in lines)
    before, _, rest = page.read_text().partition(START)
    page.write_text(before + START + "\n" + "\n".join(lines).rstrip() + "\n" + END + rest.partition(END)[2])
    raise SystemExit(f"{failed} pair(s) fail" if failed else 0)


def table(pool: RankPool, folder: Path, lora: bool) -> list[str]:
    lines = head("", list(LAYOUTS))
    for first in LAYOUTS:
        root = folder / f"{first}-{lora}"
        whole = train(pool, root, first, lora)
        cells = [cell(pool, folder, root, whole, (first, second), lora, "packed") for second in LAYOUTS]
        lines.append(f"| **{first}** | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def data_table(pool: RankPool, folder: Path) -> list[str]:
    pairs = [("fsdp2 ×2", "fsdp2 ×2"), ("fsdp2 ×2", "single"), ("single", "fsdp2 ×4"), ("hsdp 2×2", "tp ×2")]
    lines = head("", [f"{first} → {second}" for first, second in pairs])
    kinds = {
        "packed": "packed chats",
        "workers": "packed chats, built ahead by two workers",
        "stream": "streamed text, read ahead by a worker",
    }
    for kind, name in kinds.items():
        cells = []
        for first, second in pairs:
            root = folder / f"{kind}-{first}"
            whole = train(pool, root, first, False, kind=kind)
            cells.append(cell(pool, folder, root, whole, (first, second), False, kind))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def head(corner: str, columns: list[str]) -> list[str]:
    return [f"| {corner} | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]


def cell(
    pool: RankPool, folder: Path, root: Path, whole: dict[str, Any], pair: tuple[str, str], lora: bool, kind: str
) -> str:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            rest = train(pool, Path(place), pair[1], lora, checkpoint(root), kind)
            worst = difference(rest, whole, same_layout=pair[0] == pair[1])
        except (AssertionError, TimeoutError) as error:
            print(error, file=sys.stderr)
            return "**fails**"
    return "0" if worst == 0 else f"{worst:.0e}"


if __name__ == "__main__":
    main()
