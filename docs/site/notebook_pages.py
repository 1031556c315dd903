"""The notebooks as pages of the site, with the outputs that they keep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
PLACES = {f"notebooks/{file.stem}.ipynb": f"notebooks/{file.stem}.md" for file in sorted(FOLDER.glob("*.ipynb"))}
"""A notebook's place in the repository → its page in the site."""
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
MARK = re.compile(r"<p>NOTEBOOK-OUTPUT-(\d+)</p>")


def pages() -> dict[str, str]:
    """Markdown of each notebook, by its place in the site; outputs of HTML are marks that `filled` replaces."""
    return {page: _page(_cells(page)) for page in PLACES.values()}


def filled(html: str, page: str) -> str:
    """The HTML of a page with what its notebook shows as HTML."""
    if page not in PLACES.values():
        return html
    outputs = _outputs(_cells(page))
    return MARK.sub(lambda mark: f'<div class="notebook-output">{_html(outputs[int(mark[1])])}</div>', html)


def _cells(page: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{Path(page).stem}.ipynb").read_text(encoding="utf-8"))["cells"]


def _page(cells: list[dict[str, Any]]) -> str:
    parts, number = [], 0
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if _html(output):
                parts.append(f"NOTEBOOK-OUTPUT-{number}")
            elif text := _text(output):
                parts.append(f"````text\n{text}\n````")
            number += 1
    return "\n\n".join(parts) + "\n"


def _outputs(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [output for cell in cells for output in cell.get("outputs", ())]


def _html(output: dict[str, Any]) -> str:
    return "".join(output.get("data", {}).get("text/html", ""))


def _text(output: dict[str, Any]) -> str:
    return COLOURS.sub("", "".join(output.get("text", output.get("data", {}).get("text/plain", "")))).strip("\n")
