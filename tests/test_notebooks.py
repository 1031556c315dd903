"""Every notebook is its source, keeps its outputs, and names what exists. `make notebooks` runs them; here one runs."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.processes import call, run_code

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
RUN = runpy.run_path(str(NOTEBOOKS / "run.py"), run_name="run")
SOURCES: list[Path] = RUN["sources"]()
LARGEST = 300_000  # bytes
# A path of the machine where it was run. The site's own pages and addresses are none.
PLACE = re.compile(r"(?<![\w.<])/(?:home|root|tmp|work|Users|usr|mnt|var|private)/")


def kept(source: Path) -> dict[str, Any]:
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))


def outputs(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in content["cells"] for output in cell.get("outputs", ())]


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)
def test_it_is_its_source(source: Path) -> None:
    content, made = kept(source), RUN["notebook"](source.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    cells = [(cell["cell_type"], cell["id"], "".join(cell["source"])) for cell in content["cells"]]
    again = f"`make notebooks NOTEBOOKS={source.stem}` writes it again"
    assert cells == [(cell["cell_type"], cell["id"], cell["source"]) for cell in made["cells"]], again
    assert len({cell["id"] for cell in content["cells"]}) == len(cells)
    assert content["cells"][0]["cell_type"] == "markdown"
    assert "".join(content["cells"][0]["source"]).startswith("# ")


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)
def test_it_keeps_outputs_that_anybody_may_see(source: Path) -> None:
    content = kept(source)
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(isinstance(cell["execution_count"], int) for cell in code), "a cell has not been run"
    found = outputs(content)
    assert {output["output_type"] for output in found} <= {"stream", "display_data", "execute_result"}
    assert "stderr" not in {output.get("name") for output in found}
    assert found
    assert any("text/html" in output.get("data", {}) for output in found) or "trl" in source.stem  # TRL prints
    text = json.dumps(found, ensure_ascii=False)
    assert "Traceback" not in text
    assert "<script" not in text
    assert not PLACE.search(text), PLACE.search(text)
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text) or len(socket.gethostname()) < 6
    assert source.with_suffix(".ipynb").stat().st_size < LARGEST


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)
def test_what_it_imports_exists(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("automodel_trainer"):
            module = importlib.import_module(str(node.module))
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_the_page_and_the_site_list_all() -> None:
    page, nav = (NOTEBOOKS / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for source in SOURCES:
        title = "".join(kept(source)["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
        assert f"[{title}]({source.stem}.ipynb)" in page
        assert f"notebooks/{source.stem}.md" in nav


def run_source(source: Path) -> None:
    run_code(source.read_text(encoding="utf-8"), source)


def test_the_first_one_runs(tmp_path: Path) -> None:
    """As a script, because Jupyter is not a part of the environment of tests."""
    printed = call(tmp_path, run_source, NOTEBOOKS / "first_fine_tuning.py")
    assert "step 60/60" in printed
    assert (tmp_path / "runs/notebook/checkpoints/step-00000060/model/config.json").is_file()


def test_cells() -> None:
    assert RUN["cells"]("# %% [markdown]\n# Text\n#\n# more\n\n# %%\nx = 1\n") == [
        ("markdown", "Text\n\nmore"),
        ("code", "x = 1"),
    ]
    with pytest.raises(SyntaxError):
        RUN["notebook"]("# %%\nx = = 1\n")


def test_where_it_was_run_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    found = RUN["tidied"](
        [
            {"output_type": "stream", "name": "stderr", "text": "noise"},
            {"output_type": "stream", "name": "stdout", "text": f"{tmp_path}/run/runs"},
            {"output_type": "stream", "name": "stderr", "text": "noise"},
            {"output_type": "stream", "name": "stdout", "text": "/a"},
            {"output_type": "display_data", "data": {"text/html": f"<b>{tmp_path}/run</b>"}},
        ],
        tmp_path / "run",
    )
    assert [output.get("text", output.get("data")) for output in found] == ["runs/a", {"text/html": "<b></b>"}]
