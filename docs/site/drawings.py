"""Draw the pictures of docs/concepts.md: `python docs/site/drawings.py` writes docs/drawings/*.svg."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "drawings"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d")
FONT = 'font-family="system-ui, sans-serif"'
INK, SOFT, LINE = "#1f2328", "#57606a", "#d0d7de"


def text(x: float, y: float, words: str, *, size: int = 13, colour: str = INK, bold: bool = False, to: str = "") -> str:
    """One line of text; `to` is where x lies in it (start, middle)."""
    weight = ' font-weight="600"' if bold else ""
    anchor = f' text-anchor="{to}"' if to else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{weight}{anchor}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str = "#ffffff", round_: int = 2) -> str:
    """A rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_}" fill="{fill}" stroke="{line}"/>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A line with a head."""
    return f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{SOFT}" stroke-width="1.5" marker-end="url(#head)"/>'


def picture(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A page with everything on it."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker></defs>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'{FONT} role="img" aria-label="{escape(label)}">',
            head,
            box(0.5, 0.5, width - 1, height - 1, "#ffffff", LINE, 10),
            *parts,
            "</svg>\n",
        ]
    )


# --- layouts ----------------------------------------------------------------------------------------------------------

SIDE = 104  # of a matrix

# Name, what happens, how the matrix is cut (rows, columns, copies), and for each GPU the row of the batch it works on.
LAYOUTS: list[tuple[str, str, tuple[int, int], list[int], list[str]]] = [
    ("ddp", "whole on every GPU", (1, 1), [0] * 8, [f"row {i}" for i in range(8)]),
    ("fsdp2", "rows of it on 8 GPUs", (8, 1), list(range(8)), [f"row {i}" for i in range(8)]),
    ("hsdp:dp_replicate=2", "the same in two groups", (4, 1), [0, 1, 2, 3] * 2, [f"row {i}" for i in range(8)]),
    (
        "fsdp2:tp=2",
        "halves, each in 4 parts",
        (4, 2),
        list(range(8)),
        [f"row {i // 2}" for i in range(8)],
    ),
    (
        "fsdp2:cp=2",
        "rows of it on 8 GPUs",
        (8, 1),
        list(range(8)),
        [f"row {i // 2}, {'first half' if i % 2 == 0 else 'second half'}" for i in range(8)],
    ),
    (
        "3d:pp=2",
        "4 parts; a stage has its blocks",
        (4, 1),
        [0, 1, 2, 3] * 2,
        [f"row {i % 4}, {'first' if i < 4 else 'last'} blocks" for i in range(8)],
    ),
]


def layouts() -> str:
    """What each layout does to one matrix and to the rows of a batch."""
    parts = []
    for index, (name, what, (down, across), owner, rows) in enumerate(LAYOUTS):
        x, y = 24 + 300 * (index % 3), 30 + 270 * (index // 3)
        parts += [text(x, y, name, size=15, bold=True), text(x, y + 18, what, size=12, colour=SOFT)]
        for cell in range(down * across):
            row, column = cell // across, cell % across
            gpus = [gpu for gpu in range(8) if owner[gpu] == cell]
            fill = COLOURS[gpus[0]] if len(gpus) == 1 else "#8c959f" if len(gpus) == 8 else f"url(#mix{index}_{cell})"
            if 1 < len(gpus) < 8:
                parts.append(_stripes(f"mix{index}_{cell}", [COLOURS[gpu] for gpu in gpus]))
            width, height = SIDE / across, SIDE / down
            parts.append(box(x + column * width, y + 32 + row * height, width, height, fill))
        for gpu in range(8):
            place = y + 38 + gpu * 24
            parts += [
                box(x + 124, place, 12, 12, COLOURS[gpu]),
                text(x + 142, place + 11, f"{gpu}: {rows[gpu]}", size=12),
            ]
    return picture(924, 560, "Each layout: a matrix cut over eight GPUs, and the rows that each works on", parts)


def _stripes(name: str, colours: list[str]) -> str:
    width = 8
    bars = "".join(
        f'<rect x="{width * i}" width="{width}" height="{width * len(colours)}" fill="{colour}"/>'
        for i, colour in enumerate(colours)
    )
    size = width * len(colours)
    return (
        f'<defs><pattern id="{name}" width="{size}" height="{size}" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)">{bars}</pattern></defs>'
    )


# --- a step -----------------------------------------------------------------------------------------------------------


def step() -> str:
    """One optimizer step on two GPUs with three micro-batches each."""
    parts = [text(24, 34, "One optimizer step", size=15, bold=True)]
    columns = [
        (24, 130, "count"),
        (174, 360, "forward and backward"),
        (574, 90, "reduce"),
        (694, 80, "clip"),
        (804, 96, "AdamW"),
    ]
    for x, width, title in columns:
        parts.append(text(x + width / 2, 66, title, size=12, colour=SOFT, to="middle"))
    for gpu in range(2):
        y = 80 + 78 * gpu
        parts.append(box(24, y, 130, 56, "#eef1f4", LINE, 6))
        parts.append(text(89, y + 24, f"GPU {gpu}", bold=True, to="middle"))
        parts.append(text(89, y + 42, f"{(410, 388)[gpu]} trained tokens", size=11, colour=SOFT, to="middle"))
        for micro in range(3):
            x = 174 + 124 * micro
            parts += [box(x, y, 46, 56, "#cfe3f7", LINE, 6), text(x + 23, y + 33, "F", to="middle")]
            parts += [box(x + 50, y, 62, 56, "#f9d9b8", LINE, 6), text(x + 81, y + 33, "B", to="middle")]
        parts += [box(694, y, 80, 56, "#e3ebe3", LINE, 6), text(734, y + 33, "norm ≤ 1", size=12, to="middle")]
        parts += [box(804, y, 96, 56, "#e8e0f0", LINE, 6), text(852, y + 33, "its shard", size=12, to="middle")]
    parts += [box(574, 80, 90, 134, "#fbe3e3", LINE, 6), text(619, 150, "sums", to="middle")]
    parts += [arrow(154, 108, 172, 108), arrow(154, 186, 172, 186)]
    parts += [arrow(546, 108, 572, 108), arrow(546, 186, 572, 186)]
    parts += [
        arrow(664, 108, 692, 108),
        arrow(664, 186, 692, 186),
        arrow(774, 108, 802, 108),
        arrow(774, 186, 802, 186),
    ]
    parts.append(
        text(24, 246, "loss = Σ token losses / 798 trained tokens, of both GPUs and all six micro-batches", size=14)
    )
    parts.append(text(24, 268, "Nothing waits for the device, except at log steps.", size=12, colour=SOFT))
    return picture(924, 288, "One optimizer step: count, forward and backward, reduce, clip, step", parts)


# --- a checkpoint -----------------------------------------------------------------------------------------------------

FILES = [
    ("model/", "a Hugging Face folder; of adapters, PEFT's", "#cfe3f7"),
    ("optimizer/", "shards, one file a rank", "#f9d9b8"),
    ("trainer.json", "steps, schedules, callbacks", "#e3ebe3"),
    ("rank-00000.json …", "random generators, place in the data", "#e3ebe3"),
    ("manifest.json", "every file with its checksum: written last", "#fbe3e3"),
]


def checkpoint() -> str:
    """The files of a checkpoint in the order in which they are written."""
    parts = [text(24, 34, "step-00000100.tmp/", size=15, bold=True)]
    for index, (name, what, fill) in enumerate(FILES):
        y = 52 + 44 * index
        parts += [box(24, y, 412, 34, fill, LINE, 6), text(38, y + 22, name, bold=True)]
        parts.append(text(186, y + 22, what, size=11, colour=SOFT))
    parts += [arrow(442, 150, 502, 150), text(470, 138, "rename", size=12, colour=SOFT, to="middle")]
    parts += [box(508, 128, 170, 44, "#eef1f4", LINE, 6), text(593, 155, "step-00000100/", bold=True, to="middle")]
    parts += [arrow(684, 150, 744, 150), text(714, 138, "then", size=12, colour=SOFT, to="middle")]
    parts += [box(754, 128, 146, 44, "#eef1f4", LINE, 6), text(827, 155, "latest →", bold=True, to="middle")]
    parts.append(text(508, 210, "Killed before the rename: the earlier checkpoint is the newest.", size=12))
    parts.append(text(508, 230, "Killed after it: this one is, and it is whole.", size=12))
    return picture(924, 286, "The files of a checkpoint in the order in which they are written", parts)


DRAWINGS = {"layouts.svg": layouts, "step.svg": step, "checkpoint.svg": checkpoint}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
