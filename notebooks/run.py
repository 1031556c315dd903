"""Run notebooks in Jupyter's kernel and keep their outputs: `make notebooks`, or `python notebooks/run.py NAME …`.

The source of a notebook is a Python file: `# %%` begins a cell of code, `# %% [markdown]` one of text. Each runs
in an empty folder; what the quickstarts prepare is shared. Standard error (progress bars, notices) is not kept.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PREPARED = ROOT / "build" / "notebooks"
SHARED = ("quickstart", "vlm_quickstart")  # folders of runs/ that hold models and data
SECONDS = 300  # for a whole notebook, unless `--seconds` says otherwise


def sources() -> list[Path]:
    """The sources of all notebooks."""
    return sorted(file for file in HERE.glob("*.py") if file.stem != "run")


def cells(source: str) -> list[tuple[str, str]]:
    """Kind (`markdown` or `code`) and text of each cell."""
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]
    found = []
    for mark, text in zip(parts[::2], parts[1::2]):
        markdown = "[markdown]" in mark
        body = re.sub(r"^# ?", "", text, flags=re.MULTILINE) if markdown else text
        found.append(("markdown" if markdown else "code", body.strip()))
    return found


def notebook(source: str) -> dict[str, Any]:
    """The notebook of a source, without outputs."""
    made: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(source)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text}
        if kind == "code":
            ast.parse(text)
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def run(content: dict[str, Any], folder: Path, seconds: int) -> Any:
    """Run all cells in a kernel, in `folder`, each in so many seconds; return the notebook with what they show.

    Raises:
        CellExecutionError: a cell failed; with its traceback.
    """
    import nbformat
    from nbclient import NotebookClient

    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    made = nbformat.from_dict(content)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(made, timeout=seconds, kernel_name="python3", record_timing=False, resources=resources).execute()
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs = tidied(cell.outputs, folder)
    return made


def tidied(outputs: Iterable[Any], folder: Path) -> list[Any]:
    """The outputs that are kept: without standard error, and without the place where they were made."""
    here = re.compile(rf"(?:{re.escape(str(folder.resolve()))}|{re.escape(str(folder))})/?")
    kept: list[Any] = []
    before: Any = {}  # what was kept last: neighbours of one stream become one
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if "text" in output:
            output["text"] = here.sub("", output["text"])
            if before.get("name") == output["name"]:
                before["text"] += output["text"]
                continue
        for kind, text in output.get("data", {}).items():
            output["data"][kind] = here.sub("", text) if isinstance(text, str) else text
        before = output
        kept.append(output)
    return kept


def main() -> None:
    """Run the notebooks of these names, or all, and write each beside its source."""
    import nbformat

    parser = argparse.ArgumentParser(prog="notebooks/run.py", description=main.__doc__)
    parser.add_argument("names", nargs="*", help="of notebooks (default: all)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="that each may take (default: %(default)s)")
    args = parser.parse_args()
    for source in sources():
        if args.names and source.stem not in args.names:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "runs").mkdir()
            for name in SHARED:
                (PREPARED / name).mkdir(parents=True, exist_ok=True)
                (Path(folder) / "runs" / name).symlink_to(PREPARED / name)
            made = run(notebook(source.read_text(encoding="utf-8")), Path(folder), args.seconds)
        nbformat.write(made, source.with_suffix(".ipynb"))
        seconds = time.monotonic() - started
        print(f"{source.stem}: {seconds:.0f} s", flush=True)
        assert seconds < args.seconds, f"{source.stem} must run within {args.seconds} s"


if __name__ == "__main__":
    main()
