"""The part of a page about ranks: what each waited and computed, the slowest first."""

from __future__ import annotations

from html import escape
from statistics import fmean, median
from typing import Any

from automodel_trainer.callbacks.rank_times import NAMES
from automodel_trainer.nn.chart import chart, short

LATEST = 10  # lines that the table is a mean of
MOST = 16  # ranks in the table
DRAWN = 4  # ranks in the chart
FAR = 1.5  # times the median of all ranks: more is marked
TITLES = {
    "data_wait": "waits for data, s/step",
    "cpu": "CPU time, s/step",
    "peak_memory_gib": "peak memory, GiB",
    "own": "outside of collectives, s/step",
    "probe": "fixed work of its GPU, s",
}
SMALL = {"data_wait": 0.01, "cpu": 0.01, "peak_memory_gib": 0.1, "own": 0.02, "probe": 0.0}
"""Differences from the median that matter to nobody."""


def means(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of each quantity, the mean of the latest lines for every rank."""
    latest = lines[-LATEST:]
    return {name: [fmean(values) for values in zip(*(line[name] for line in latest))] for name in NAMES}


def stragglers(values: list[float], small: float) -> set[int]:
    """Ranks whose value is far above the median of all."""
    middle = median(values)
    return {rank for rank, value in enumerate(values) if value > FAR * middle and value - middle > small}


def ranks_section(lines: list[dict[str, Any]]) -> str:
    """The table and a chart of the slowest ranks; "" if nothing is known of ranks."""
    if not lines:
        return ""
    table = means(lines)
    far = {name: stragglers(table[name], SMALL[name]) for name in NAMES}
    order = sorted(range(len(table["cpu"])), key=lambda rank: -(table["data_wait"][rank] + table["cpu"][rank]))
    head = "".join(f'<td class="soft">{TITLES[name]}</td>' for name in NAMES)
    rows = "".join(
        f"<tr><th>{rank}</th>"
        + "".join(f'<td class="{"bad" if rank in far[name] else ""}">{short(table[name][rank])}</td>' for name in NAMES)
        + "</tr>"
        for rank in order[:MOST]
    )
    more = f'<p class="soft">and {len(order) - MOST} ranks that are faster</p>' if len(order) > MOST else ""
    curves = {
        f"rank {rank}": {line["step"]: line["data_wait"][rank] + line["cpu"][rank] for line in lines}
        for rank in sorted(order[:DRAWN])
    }
    keys = "".join(f'<span class="key c{index}">{name}</span>' for index, name in enumerate(curves))
    words = f"mean of the last {min(LATEST, len(lines))} log steps, the slowest first; red: {FAR} times the median"
    return (
        f'<h2>Ranks</h2>{_said(lines)}<div class="grid-of"><section><p class="soft">{words}</p><table>'
        f"<tr><th>rank</th>{head}</tr>{rows}</table>{more}</section>"
        f"<section><h3>waiting for data and CPU time, s/step</h3>{chart(curves)}{keys}"
        "</section></div>"
    )


def _said(lines: list[dict[str, Any]]) -> str:
    """What the run has said about stragglers, the latest last."""
    said = [text for line in lines for text in _texts(line.get("said"))][-MOST:]
    return "".join(f'<p class="bad">straggler: {escape(text)}</p>' for text in said)


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
