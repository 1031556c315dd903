"""A part of docs/models.md is measured again: other families with every commit, all of them in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = 3
COLUMNS = ("packed", "trains")


def recorded() -> dict[tuple[str, str], str]:
    """What the page says, by family and column: right, refused, bug, …"""
    lines = (ROOT / "docs/models.jsonl").read_text().splitlines()
    return {(r["family"], r["column"]): r["cell"]["kind"] for r in map(json.loads, lines) if r["column"] in COLUMNS}


def part(names: list[str]) -> list[str]:
    """The families of this commit. `AMT_MATRIX_PART=7` asks for the seventh part."""
    asked = os.environ.get("AMT_MATRIX_PART")
    if asked is None:
        count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        asked = count.stdout.strip() or "0"  # a source tree without git
    start = int(asked) * FAMILIES % len(names)
    return [names[(start + index) % len(names)] for index in range(FAMILIES)]


def test_a_part_of_the_matrix(tmp_path: Path) -> None:
    page, results = recorded(), tmp_path / "models.jsonl"
    families = part(sorted({family for family, _ in page}))
    script = [sys.executable, str(ROOT / "docs/model_matrix.py"), "--file", str(results), "--columns", *COLUMNS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*script, "--families", *families], env=environment, capture_output=True, check=False)
    lines = map(json.loads, results.read_text().splitlines())
    found = {(r["family"], r["column"]): r["cell"] for r in lines}
    assert {family for family, _ in found} == set(families)
    for key, cell in found.items():
        assert cell["kind"] == page.get(key, cell["kind"]), f"{key}: {cell}"
