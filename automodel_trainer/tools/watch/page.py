"""The page of a run. It has no script; all that a run contains is escaped text."""

from __future__ import annotations

from datetime import datetime
from html import escape
from typing import Any

from automodel_trainer.nn.chart import Curve, chart, short
from automodel_trainer.tools.watch.diff import diff, loss_text
from automodel_trainer.tools.watch.ranks import ranks_section
from automodel_trainer.tools.watch.run import Run, Saved

AGAIN = 10  # seconds until the page of a run that goes on is loaded again

# Charts in this order, each with the curves that it shows; curves that no chart names come after them, one each.
CHARTS = {
    "loss": ("train_loss", "val_loss"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
    "share of the device's peak (MFU)": ("mfu",),
    "peak memory, GiB": ("peak_memory_gib",),
    "share of the time that waits for data": ("data_wait",),
}
NOT_DRAWN = ("epoch", "hp_metric", "step")
CARDS = {"train_loss": "loss", "val_loss": "validation loss", "tokens_per_second": "tokens/s", "mfu": "MFU"}
CARDS |= {"peak_memory_gib": "GiB at most"}

KINDS = {"trained": "trained", "masked": "only read", "padding": "padding"}

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b1f26;--soft:#667085;--line:#e3e6eb;--c0:#3b6fd4;
--c1:#d9772b;--c2:#2da160;--c3:#a457b8;--trained:#d3f3df;--trained-ink:#0c4a26;--masked:#eef0f4;--masked-ink:#5b6472;--bad:#b42318}
@media (prefers-color-scheme:dark){:root{--bg:#0f1216;--card:#171b21;--ink:#e6e9ee;--soft:#8b94a3;--line:#272d36;
--c0:#7aa7f7;--c1:#f2a65e;--c2:#5fd39a;--c3:#cf9be0;--trained:#14452a;--trained-ink:#c9f5da;--masked:#222831;--masked-ink:#97a1b0;
--bad:#f97066}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:20px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:21px;margin:0;overflow-wrap:anywhere}h2{font-size:16px;margin:26px 0 10px}h3{font-size:13px;margin:0 0 6px}
p{margin:4px 0}.soft{color:var(--soft)}.bad{color:var(--bad)}
.grid-of{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));margin-top:14px}
.card,section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.card b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.card span{color:var(--soft);font-size:13px}
svg{width:100%;height:auto;display:block}.grid{stroke:var(--line)}.tick{font-size:11px;fill:var(--soft)}
polyline{fill:none;stroke-width:1.8}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.dot{fill:var(--card)}
.key{font-size:12px;margin-right:10px}
.key.c0{color:var(--c0)}.key.c1{color:var(--c1)}.key.c2{color:var(--c2)}.key.c3{color:var(--c3)}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{text-align:left;vertical-align:top;padding:5px 10px 5px 0;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}th{font-weight:600;white-space:nowrap;color:var(--soft)}
pre,.row{font:13px/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere;margin:0}
.row span{border-radius:3px;padding:1px 0}.trained{background:var(--trained);color:var(--trained-ink)}
.masked{background:var(--masked);color:var(--masked-ink)}.padding{color:var(--soft);opacity:.6}
.document{border-top:1px dashed var(--line);padding-top:8px;margin-top:8px}
img{max-width:100%;background:#fff;border-radius:6px}summary{cursor:pointer}
"""


def page(run: Run, beside: Run | None = None) -> str:
    """The run as one HTML page. It asks for nothing but the pictures of callbacks (`/picture/0`, …).

    Args:
        run: the run.
        beside: another one, whose curves are drawn over those of the run, and what differs between them.
    """
    going_on = run.going_on or (beside is not None and beside.going_on)
    again = f'<meta http-equiv="refresh" content="{AGAIN}">' if going_on else ""
    parts = [_head(run), _beside(run, beside), _problems(run.problems), _charts(run.curves, beside)]
    parts += [ranks_section(run.ranks), _first_row(run.ledger), _ledger(run)]
    parts += [_checkpoints(run.checkpoints), _pictures(run), _config(run.config)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.folder.name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def trouble(words: str) -> str:
    """A page that says why there is none now, and tries again."""
    again = f'<meta charset="utf-8"><meta http-equiv="refresh" content="{AGAIN}">'
    return f"<!doctype html>\n<html><head>{again}<title>run</title></head><body><p>{escape(words)}</p></body></html>\n"


def _head(run: Run) -> str:
    planned = f" of {run.planned:,}" if run.planned else ""
    state = "goes on" if run.going_on else f"last change {_ago(run.age)} ago" if run.age is not None else ""
    cards = [("step", f"{run.step:,}{planned}")]
    cards += [(words, short(_last(run.curves[name]))) for name, words in CARDS.items() if run.curves.get(name)]
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in cards
    )
    where = escape(str(run.folder.resolve()))
    return f'<header><h1>{where}</h1><p class="soft">{escape(state)}</p><div class="cards">{shown}</div></header>'


def _last(curve: Curve) -> float:
    return curve[max(curve)]


def _problems(problems: list[str]) -> str:
    return "".join(f'<p class="bad">not read: {escape(problem)}</p>' for problem in problems)


def _beside(run: Run, other: Run | None) -> str:
    """Where two runs part: the first losses that differ, and the settings that do."""
    if other is None:
        return ""
    facts = diff(run, other)
    where = escape(str(other.folder.resolve()))
    losses = [(name, loss_text(compared)) for name, compared in facts["loss"].items()]
    config = [(name, f"{a}  →  {b}") for name, (a, b) in facts["config"].items()]
    rows = "".join(
        f'<tr><td class="soft">{escape(name)}</td><td>{escape(text)}</td></tr>' for name, text in losses + config
    )
    return f'<h2>Beside it (B)</h2><section><p class="soft">{where}</p><table>{rows}</table></section>'


def _charts(curves: dict[str, Curve], beside: Run | None) -> str:
    others = beside.curves if beside is not None else {}
    names = [*curves, *(name for name in others if name not in curves)]
    named = {name for group in CHARTS.values() for name in group}
    groups = {**CHARTS, **{name: (name,) for name in names if name not in named and name not in NOT_DRAWN}}
    drawn = [
        _chart(
            title, {**_chosen(curves, group), **{f"B: {name}": curve for name, curve in _chosen(others, group).items()}}
        )
        for title, group in groups.items()
    ]
    return f'<h2>Curves</h2><div class="grid-of">{"".join(drawn)}</div>' if any(drawn) else ""


def _chosen(curves: dict[str, Curve], names: tuple[str, ...]) -> dict[str, Curve]:
    return {name: curves[name] for name in names if name in curves}


def _chart(title: str, curves: dict[str, Curve]) -> str:
    picture = chart(curves)
    if not picture:
        return ""
    keys = [f'<span class="key c{index % 4}">{escape(name)}</span>' for index, name in enumerate(curves)]
    return f"<section><h3>{escape(title)}</h3>{picture}{''.join(keys) if len(keys) > 1 else ''}</section>"


def _first_row(ledger: dict[str, Any]) -> str:
    documents = ledger.get("first_row")
    if not isinstance(documents, list):
        return ""
    shown = []
    for document in documents:
        parts = document if isinstance(document, list) else []
        runs = [part for part in parts if isinstance(part, list) and len(part) == 2]
        spans = (f'<span class="{_kind(kind)}">{escape(_shown(kind, str(text)))}</span>' for kind, text in runs)
        shown.append(f'<div class="row document">{"".join(spans)}</div>')
    legend = " ".join(f'<span class="{kind}">{words}</span>' for kind, words in KINDS.items())
    return f'<h2>First batch, first row</h2><section><div class="row">{legend}</div>{"".join(shown)}</section>'


def _shown(kind: Any, text: str) -> str:
    """The text of padding is the same token again and again."""
    return text[:40] + "…" if kind == "padding" and len(text) > 40 else text


def _kind(kind: Any) -> str:
    return kind if kind in KINDS else "masked"


def _ledger(run: Run) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in run.rows())
    return f"<h2>Ledger</h2><section><table>{rows}</table></section>" if rows else ""


def _checkpoints(saved: list[Saved]) -> str:
    rows = []
    for checkpoint in reversed(saved):
        when = (
            "" if checkpoint.created is None else datetime.fromtimestamp(checkpoint.created).isoformat(" ", "seconds")
        )
        good = checkpoint.health == "whole"
        health = "names and sizes are right" if good else checkpoint.health
        name = f"{checkpoint.path.parent.name}/{checkpoint.path.name}"
        rows.append(
            f'<tr><td>{escape(name)}</td><td>{when}</td><td class="{"" if good else "bad"}">{escape(health)}</td></tr>'
        )
    return f"<h2>Checkpoints</h2><section><table>{''.join(rows)}</table></section>" if rows else ""


def _pictures(run: Run) -> str:
    images = "".join(f'<img src="/picture/{number}" alt="load of the experts">' for number in range(len(run.pictures)))
    return f"<h2>Load of the experts</h2><section>{images}</section>" if images else ""


def _config(config: str) -> str:
    if not config:
        return ""
    shown = f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"
    return f"<h2>Configuration</h2><section>{shown}</section>"


def _ago(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0, seconds):.0f} seconds"
