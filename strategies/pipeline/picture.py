"""A pipeline schedule as a picture: a text grid, or an HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence

from automodel_trainer.strategies.pipeline.schedule import Timed, Work, bubble_share, order_of_work, timeline, unsplit

_IDLE = "·"
_COLUMNS = 110
_COLORS = {"F": "#7aa6da", "B": "#8fbc8f", "I": "#8fbc8f", "W": "#d9b26a"}
_WORDS = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}


def schedule_facts(
    name: str,
    ranks: int,
    per_rank: int,
    micro_batches: int,
    costs: Sequence[float] | None = None,
    whole_backward: bool = False,
) -> tuple[list[Timed], float]:
    """The timeline of a schedule, and the share of time that ranks wait in it.

    Args:
        name: the schedule's name.
        ranks: number of pipeline ranks.
        per_rank: stages per rank.
        micro_batches: per optimizer step.
        costs: the cost of one forward of every stage; None: all equal.
        whole_backward: do not split backwards even if the schedule does.

    Raises:
        ValueError: the schedule is unknown, or cannot run this number of micro-batches.
    """
    order = order_of_work(name, ranks, per_rank, micro_batches)  # it also checks the arguments
    timed = timeline(unsplit(order) if whole_backward else order, costs)
    return timed, bubble_share(timed)


def text_picture(timed: Sequence[Timed], columns: int = _COLUMNS) -> list[str]:
    """One line per rank: `0`, `1`, … is the forward of a micro-batch, `a`, `b`, … its backward, `·` waiting.

    A column is the duration of the shortest piece of work. Lines longer than `columns` are cut off with `…`. The text
    does not show which stage of a rank works; the HTML page does.
    """
    unit = min((t.end - t.start for t in timed if t.end > t.start), default=1.0)
    ranks = 1 + max(t.rank for t in timed)
    width = round(max(t.end for t in timed) / unit)
    lines = []
    for rank in range(ranks):
        cells = [_IDLE] * width
        for t in timed:
            if t.rank == rank:
                for column in range(round(t.start / unit), round(t.end / unit)):
                    cells[column] = _sign(t.work)
        lines.append("".join(cells[:columns]) + ("…" if width > columns else ""))
    return lines


def _sign(work: Work) -> str:
    """The character for one piece of work: see `legend`."""
    letters = "0123456789" if work.kind == "F" else "abcdefghij"
    sign = letters[work.micro_batch % 10]
    return sign.upper() if work.kind == "W" else sign


def legend(timed: Sequence[Timed]) -> str:
    """Explain the characters of `text_picture` that occur."""
    split = any(t.work.kind == "W" for t in timed)
    backward = "a-j backward (inputs), A-J backward (weights)" if split else "a-j backward"
    return f"0-9 forward of micro-batch 0-9, 10-19, …; {backward}; {_IDLE} waiting"


def html_picture(timed: Sequence[Timed], title: str) -> str:
    """A standalone HTML page without scripts: a row per rank, a box per piece of work."""
    scale = 1000 / max(t.end for t in timed)
    rows = []
    for rank in range(1 + max(t.rank for t in timed)):
        boxes = [
            f'<i style="left:{t.start * scale:.2f}px;width:{(t.end - t.start) * scale:.2f}px;'
            f'background:{_COLORS[t.work.kind]};filter:brightness({1 - 0.12 * _visit(timed, t):.2f})" '
            f'title="stage {t.work.stage}, micro-batch {t.work.micro_batch}: {_WORDS[t.work.kind]}">'
            f"{t.work.micro_batch}</i>"
            for t in timed
            if t.rank == rank and t.end > t.start
        ]
        rows.append(f"<b>rank {rank}</b><div>{''.join(boxes)}</div>")
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>"
        "body{font:14px sans-serif;margin:2em}div{position:relative;height:28px;width:1000px;background:#eee;"
        "margin:0 0 8px}i{position:absolute;height:26px;font:11px/26px sans-serif;text-align:center;overflow:hidden;"
        "border:1px solid #fff;box-sizing:border-box}</style>"
        f"<h3>{html.escape(title)}</h3>{''.join(rows)}"
        "<p>Blue: forward. Green: backward (of inputs, if it is split). Yellow: backward of weights. Darker: a later "
        "stage of the same rank. Grey: waiting.</p>"
    )


def _visit(timed: Sequence[Timed], item: Timed) -> int:
    """Whether an item belongs to its rank's first stage (0), second stage (1), and so on."""
    stages = sorted({t.work.stage for t in timed if t.rank == item.rank})
    return stages.index(item.work.stage)
