"""A small table as HTML, for notebooks. All text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, rows: Iterable[Sequence[object]], below: str = "") -> str:
    """A table whose first column names the rows.

    Args:
        title: above it.
        rows: the cells of each row.
        below: a line under it.
    """
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(str(first))}</th>'
        + "".join(f'<td style="text-align:left">{escape(str(cell))}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    end = f"<p>{escape(below)}</p>" if below else ""
    return f'<table><caption style="text-align:left"><b>{escape(title)}</b></caption>{lines}</table>{end}'
