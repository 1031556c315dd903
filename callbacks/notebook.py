"""Output of callbacks in a notebook: HTML, and a line with a curve that is replaced in place. No widgets are needed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from html import escape
from multiprocessing import parent_process
from typing import Any

from automodel_trainer.nn.chart import Curve, chart
from automodel_trainer.nn.html_table import html_table

LOSS, VALIDATION = "loss", "validation loss"
MOST_POINTS = 300  # of the curve, which is sent again each time
BLUE, ORANGE = "#3b6fd4", "#d9772b"  # of the curve, and of the dots
FONT = "font:13px/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"


def in_kernel() -> bool:
    """Whether this process shows HTML: the kernel of a notebook, and not a terminal or a worker process of `fit`."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel") and parent_process() is None


class Html:
    """HTML for a notebook, with a text for programs that show none."""

    def __init__(self, html: str, text: str) -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def display(shown: Any, **options: Any) -> Any:
    """Show something below the running cell."""
    from IPython.display import display

    return display(shown, **options)


class NotebookLine:
    """The progress of a run below the running cell: a bar, the line, the loss as a curve and validation losses as dots.

    Args:
        seconds: minimum time between two drawings.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._losses: Curve = {}
        self._validations: Curve = {}
        self._note = ""
        self._handle: Any = None
        self._drawn = 0.0

    def add(self, step: int, loss: float) -> None:
        """Add a point to the curve."""
        self._losses[step] = loss

    def add_validation(self, step: int, loss: float | None, text: str) -> None:
        """Add a dot, if there is a loss, and show a text until the next validation."""
        self._note = text
        if loss is not None:
            self._validations[step] = loss

    def draw(self, parts: Sequence[str], step: int, planned: int | None, now: bool = False) -> None:
        """Draw again, but not more often than every `seconds` unless `now` is True.

        Args:
            parts: texts of the line; empty ones are left out.
            step: the steps done.
            planned: the steps planned, if known.
            now: draw in any case.
        """
        if not now and time.monotonic() - self._drawn < self.seconds:
            return
        line = [part for part in parts if part]
        share = min(1.0, step / planned) if planned else None
        shown = [_bar(share), _line(line), f"<div>{escape(self._note)}</div>", self._chart(planned)]
        self._show("".join(shown), "  ".join(line))

    def close(self, rows: Sequence[tuple[str, str]], text: str) -> None:
        """Draw for the last time: the summary of the run and its curve.

        Args:
            rows: names and texts of the summary.
            text: the same for programs that show no HTML.
        """
        self._show(html_table("training finished", rows) + self._chart(None), text)

    def _chart(self, planned: int | None) -> str:
        curves = {LOSS: self._losses, VALIDATION: self._validations}
        picture = chart(curves, dots=(VALIDATION,), last_step=planned or 0, points=MOST_POINTS)
        if not picture:
            return ""
        keys = f'<span style="color:{BLUE}">━ {LOSS}</span> &nbsp; '
        keys += f'<span style="color:{ORANGE}">● {VALIDATION}</span>' if self._validations else ""
        return f'<div style="max-width:480px">{picture}<div>{keys}</div></div>'

    def _show(self, html: str, text: str) -> None:
        shown = Html(f'<div style="{FONT}">{html}</div>', text)
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)
        self._drawn = time.monotonic()


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    inner = f'<div style="width:{share:.1%};height:4px;border-radius:2px;background:{BLUE}"></div>'
    return f'<div style="height:4px;border-radius:2px;background:#8884;max-width:480px">{inner}</div>'


def _line(parts: Sequence[str]) -> str:
    spans = [f'<span style="white-space:nowrap">{escape(part)}</span>' for part in parts if part]
    return f"<div>{' &nbsp;'.join(spans)}</div>" if spans else ""
