"""Run a notebook's source and keep its outputs: `python notebooks/run.py first_fine_tuning` writes the .ipynb.

The source is a Python file with cells: `# %%` begins one of code, `# %% [markdown]` one of text.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def cells(source: str) -> list[tuple[str, str]]:
    """Kind (`markdown` or `code`) and text of each cell."""
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]
    found = []
    for mark, text in zip(parts[::2], parts[1::2]):
        markdown = "[markdown]" in mark
        body = re.sub(r"^# ?", "", text, flags=re.MULTILINE) if markdown else text
        found.append(("markdown" if markdown else "code", body.strip()))
    return found


def run(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell; its outputs as a notebook stores them: what it prints, and the value of a last expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.getvalue()):
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        shown = {"text/html": [value._repr_html_()]} if hasattr(value, "_repr_html_") else {"text/plain": [repr(value)]}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": shown})
    here = f"{os.getcwd()}/"  # where it was run is nobody's business
    return json.loads(json.dumps(outputs).replace(here, ""))


def notebook(source: str) -> dict[str, Any]:
    """The notebook of a source, run in the folder of the process."""
    names: dict[str, Any] = {"__name__": "__main__"}
    made = []
    for number, (kind, text) in enumerate(cells(source)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        if kind == "code":
            cell |= {"execution_count": None, "outputs": run(text, names)}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            written = notebook((HERE / f"{name}.py").read_text(encoding="utf-8"))
        text = json.dumps(written, indent=1, ensure_ascii=False) + "\n"
        (HERE / f"{name}.ipynb").write_text(text, encoding="utf-8")
