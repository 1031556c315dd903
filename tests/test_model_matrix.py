"""A part of docs/models.md is measured again: other families with every commit, all of them in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = 3
COLUMNS = ["packed", "trains"]
KINDS = ("right", "refused", "config", "transformers")  # anything but a bug


def part() -> list[str]:
    """The families of this commit. `AMT_MATRIX_PART=7` asks for the seventh part."""
    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    asked = os.environ.get("AMT_MATRIX_PART")
    if asked is None:
        count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        asked = count.stdout.strip() or "0"  # a source tree without git
    start = int(asked) * FAMILIES % len(names)
    return [names[(start + index) % len(names)] for index in range(FAMILIES)]


def test_a_part_of_the_matrix(tmp_path: Path) -> None:
    results = tmp_path / "models.jsonl"
    script = [sys.executable, str(ROOT / "docs/model_matrix.py"), "--file", str(results)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*script, "--columns", *COLUMNS, "--families", *part()], env=environment, capture_output=True)
    cells = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(cells) >= FAMILIES
    recorded = [json.loads(line) for line in (ROOT / "docs/models.jsonl").read_text().splitlines()]
    known = {(r["family"], r["column"]) for r in recorded if r["cell"].get("kind") == "bug"}
    wrong = [c for c in cells if c["cell"]["kind"] not in KINDS and (c["family"], c["column"]) not in known]
    assert not wrong
