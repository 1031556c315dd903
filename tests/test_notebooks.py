"""Every notebook runs from its source, is that source, and keeps its outputs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.processes import call

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
RUN = runpy.run_path(str(NOTEBOOKS / "run.py"), run_name="run")
SOURCES = sorted(file for file in NOTEBOOKS.glob("*.py") if file.stem != "run")


def written(source: Path, target: Path) -> None:
    target.write_text(json.dumps(RUN["notebook"](source.read_text())))


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)
def test_runs(source: Path, tmp_path: Path) -> None:
    call(tmp_path, written, source, tmp_path / "made.json")
    made = json.loads((tmp_path / "made.json").read_text())
    kept = json.loads(source.with_suffix(".ipynb").read_text())
    assert [(cell["cell_type"], cell["source"]) for cell in kept["cells"]] == [
        (cell["cell_type"], cell["source"]) for cell in made["cells"]
    ], f"`python notebooks/run.py {source.stem}` writes it again"
    kinds = [[output["output_type"] for output in cell.get("outputs", ())] for cell in kept["cells"]]
    assert kinds == [[output["output_type"] for output in cell.get("outputs", ())] for cell in made["cells"]]
    shown = json.dumps([cell.get("outputs") for cell in kept["cells"]])
    assert "<table>" in shown
    assert "polyline" in shown
    assert "Traceback" not in shown
    assert str(Path.home()) not in shown


def test_a_cell_is_run_as_a_notebook_does() -> None:
    names: dict[str, object] = {}
    assert RUN["run"]("a = 2\nprint(a)\na + 1", names) == [
        {"output_type": "stream", "name": "stdout", "text": ["2\n"]},
        {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"text/plain": ["3"]}},
    ]
    assert RUN["cells"]("# %% [markdown]\n# Text\n#\n# more\n\n# %%\nx = 1\n") == [
        ("markdown", "Text\n\nmore"),
        ("code", "x = 1"),
    ]
