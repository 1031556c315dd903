"""Draw docs/packages.svg: the packages as layers, and every import between them. `make pictures` runs this.

The layers are those of the import contract in pyproject.toml; grimp reads the imports from the code. A test fails
when the committed picture is not the one that this script draws.
"""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "packages.svg"
PACKAGE = "automodel_trainer"
HIDDEN = {"__main__"}  # `python -m automodel_trainer`: it only calls the command line

HOLDS = {
    "cli": "the amt command",
    "tools": "the commands that are not training",
    "lightning_cli": "fit, validate, test and predict from YAML",
    "trainer": "Trainer: fit(model, data); and its parts",
    "cluster": "runs on the workers of a Ray cluster",
    "callbacks": "checkpoints, preemption, watchdog, ledger, progress",
    "verification": "a layout against one device, on a small copy",
    "auto": "the auto classes of transformers, with layouts",
    "modules": "training objectives, loss, optimizer, schedule",
    "strategies": "how a model lies on devices, and one step",
    "checkpoint": "safetensors and JSON: write, read, merge, export",
    "data": "rows to packed micro-batches",
    "models": "the builder, LoRA, quantization, kernels",
    "nn": "building blocks of torch",
    "distributed": "processes and the mesh they form",
    "_fork_safe": "imports that leave CUDA alone",
    "_jsonargparse": "private names of jsonargparse",
    "_lightning": "private names of Lightning",
    "imports": "imports without a look for garbage",
}

LEFT, TOP, ROW, GAP = 24, 80, 46, 5
BOX, LANES, STEP = 372, 450, 42  # width of a box, x of the first lane, distance of lanes
HUES = (212, 28, 150, 340, 262, 190, 8, 120, 228, 45, 310, 170, 285, 70)

STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de; }
  .box { fill: #f6f8fa; stroke: #c4ccd4; }
  text { fill: #1f2328; font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12.5px; }
  .title { font-size: 17px; font-weight: 600; }
  .name { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 14px;
    font-weight: 600; }
  .soft { fill: #57606a; }
  .count { fill: #ffffff; font-size: 11px; font-weight: 600; text-anchor: middle; }
  .bus { stroke: #b6bec7; stroke-width: 1.5; fill: none; }
  .head { fill: #8c959f; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #30363d; }
    .box { fill: #161b22; stroke: #3d444d; }
    text { fill: #e6edf3; }
    .soft { fill: #9198a1; }
    .count { fill: #ffffff; }
    .bus { stroke: #3d444d; }
    .head { fill: #9198a1; }
    .lane { filter: brightness(1.25); }
  }
"""


def layers() -> list[list[list[str]]]:
    """The layers, highest first. A layer is a list of boxes, a box a list of names: files of one layer share a box."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    contract = next(c for c in settings["contracts"] if c.get("containers") == [PACKAGE])
    found = []
    for line in contract["layers"]:
        boxes = [[name.strip() for name in box.split(":")] for box in line.split("|")]
        boxes = [names for names in boxes if not HIDDEN.intersection(names)]
        if boxes:
            found.append(boxes)
    return found


def imports(boxes: list[list[str]]) -> Counter[tuple[int, int]]:
    """How many imports from file to file there are between two boxes, by their places in `boxes`."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    place = {name: index for index, names in enumerate(boxes) for name in names}
    counts: Counter[tuple[int, int]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = tuple(place.get(f"{name}.".split(".")[1]) for name in (module, imported))
            if None not in pair and pair[0] != pair[1]:
                counts[pair] += 1  # type: ignore[index]
    return counts


def draw() -> str:
    """The picture as SVG.

    Raises:
        ValueError: an import goes up.
    """
    stack = layers()
    boxes = [names for layer in stack for names in layer]
    counts = imports(boxes)
    upwards = [f"{boxes[a][0]} -> {boxes[b][0]}" for a, b in counts if a > b]
    if upwards:
        raise ValueError(f"Imports that go up: {', '.join(upwards)}. `lint-imports` names the lines.")
    importers = sorted({importer for importer, _ in counts})
    lane = {index: LANES + STEP * place for place, index in enumerate(reversed(importers))}
    width = max(lane.values()) + STEP
    middle, y = [], TOP
    for layer in stack:
        middle += [y + ROW * (index + 0.5) for index in range(len(layer))]
        y += ROW * len(layer) + GAP
    height = y + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="The packages of automodel_trainer as layers; every import goes down">',
        f"<style>{STYLE}{_colors(len(boxes))}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        f'<text class="title" x="{LEFT}" y="38">Every import goes down</text>',
        f'<text class="soft" x="{LEFT}" y="60">A line starts at a package and runs down to what it imports. '
        "A number counts imports from file to file.</text>",
    ]
    for index in range(len(boxes)):
        parts += _incoming(index, counts, lane, middle)
    for index in importers:
        parts.append(_outgoing(index, counts, lane, middle))
    for index in importers:
        parts += _counts(index, counts, lane, middle)
    top = TOP
    for layer in stack:
        parts.append(_layer(layer, top))
        top += ROW * len(layer) + GAP
    total = sum(counts.values())
    note = f"{total} imports, none of them upwards. Packages that share a box do not import each other."
    parts.append(f'<text class="soft" x="{LEFT}" y="{height - 18}">{note}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _colors(number: int) -> str:
    """A color for each lane, of its line and of its numbers."""
    lines = []
    for index in range(number):
        hue = HUES[index % len(HUES)]
        lines.append(f"  .l{index} {{ stroke: hsl({hue}, 55%, 48%); fill: none; stroke-width: 2; }}")
        lines.append(f"  .d{index} {{ fill: hsl({hue}, 58%, 38%); }}")
    return "\n".join(lines) + "\n"


def _layer(layer: list[list[str]], top: float) -> str:
    height = ROW * len(layer)
    parts = [f'<rect class="box" x="{LEFT}" y="{top}" width="{BOX}" height="{height}" rx="7"/>']
    for index, names in enumerate(layer):
        y = top + ROW * index
        if index:
            parts.append(f'<line class="bus" x1="{LEFT}" y1="{y}" x2="{LEFT + BOX}" y2="{y}" stroke-dasharray="4 4"/>')
        title = escape(" · ".join(names))
        parts.append(f'<text class="name" x="{LEFT + 14}" y="{y + 20}">{title}</text>')
        parts.append(f'<text class="soft" x="{LEFT + 14}" y="{y + 37}">{escape(HOLDS[names[0]])}</text>')
    return "\n".join(parts)


def _incoming(index: int, counts: Counter[tuple[int, int]], lane: dict[int, int], middle: list[float]) -> list[str]:
    """The line that collects what imports this package, and its arrow head at the box."""
    sources = [lane[importer] for importer, imported in counts if imported == index]
    if not sources:
        return []
    x, y = LEFT + BOX, middle[index] - 8
    return [
        f'<path class="bus" d="M {max(sources)} {y} H {x + 9}"/>',
        f'<path class="head" d="M {x + 2} {y} l 9 -4.5 v 9 z"/>',
    ]


def _outgoing(index: int, counts: Counter[tuple[int, int]], lane: dict[int, int], middle: list[float]) -> str:
    """The line from this package to the lowest one that it imports."""
    lowest = max(middle[imported] - 8 for importer, imported in counts if importer == index)
    x, y, corner = lane[index], middle[index] + 8, 8
    return f'<path class="lane l{index}" d="M {LEFT + BOX} {y} H {x - corner} Q {x} {y} {x} {y + corner} V {lowest}"/>'


def _counts(index: int, counts: Counter[tuple[int, int]], lane: dict[int, int], middle: list[float]) -> list[str]:
    """The numbers on this package's line, one where it meets the line of a package that it imports."""
    parts = []
    for (importer, imported), number in sorted(counts.items()):
        if importer == index:
            x, y = lane[index], middle[imported] - 8
            parts.append(f'<circle class="d{index}" cx="{x}" cy="{y}" r="{9 if number < 10 else 11}"/>')
            parts.append(f'<text class="count" x="{x}" y="{y + 4}">{number}</text>')
    return parts


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
