"""A part of docs/models.md is measured again. CI sets `AMT_MATRIX_PART` to the number of its run: all have a turn."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from tests.processes import call, run_code

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs/model_matrix.py"
FAMILIES = 3
COLUMNS = ("packed", "trains")


def recorded() -> dict[tuple[str, str], str]:
    """What the page says, by family and column: right, refused, bug, …"""
    lines = (ROOT / "docs/models.jsonl").read_text().splitlines()
    return {(r["family"], r["column"]): r["cell"]["kind"] for r in map(json.loads, lines) if r["column"] in COLUMNS}


def part(names: list[str]) -> list[str]:
    """The families of this run."""
    start = int(os.environ.get("AMT_MATRIX_PART", "0")) * FAMILIES % len(names)
    return [names[(start + index) % len(names)] for index in range(FAMILIES)]


def measured(*arguments: str) -> None:
    with suppress(SystemExit):  # by which it says that there are bugs
        run_code(SCRIPT.read_text(), SCRIPT, *arguments)


def test_a_part_of_the_matrix(tmp_path: Path) -> None:
    page, results = recorded(), tmp_path / "models.jsonl"
    families = part(sorted({family for family, _ in page}))
    call(tmp_path, measured, "--file", str(results), "--columns", *COLUMNS, "--families", *families)
    lines = map(json.loads, results.read_text().splitlines())
    found = {(r["family"], r["column"]): r["cell"] for r in lines}
    assert {family for family, _ in found} == set(families)
    for key, cell in found.items():
        assert cell["kind"] == page.get(key, cell["kind"]), f"{key}: {cell}"
