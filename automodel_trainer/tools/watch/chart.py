"""A curve, or several, as an SVG text."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from automodel_trainer.tools.watch.curves import Curve, finite

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 190, 62, 24, 10
MOST_POINTS = 600  # of a curve; of more, evenly spread ones are drawn


def chart(curves: Mapping[str, Curve]) -> str:
    """Draw curves over the steps, with the last value of each; "" if there is nothing to draw."""
    drawn = {name: points for name, curve in curves.items() if (points := _thinned(finite(curve)))}
    if not drawn:
        return ""
    steps = [step for points in drawn.values() for step in points]
    values = [value for points in drawn.values() for value in points.values()]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(step: int, value: float) -> str:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 8)
        y = TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(drawn))}">']
    for share in (0.0, 0.5, 1.0):
        value = low + (high - low) * share
        x, y = place(first, value).split(",")
        parts.append(f'<path class="grid" d="M{x} {y}H{WIDTH - 8}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    parts.append(f'<text class="tick" x="{LEFT}" y="{HEIGHT - 6}">{first:,}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {last:,}</text>')
    for number, (name, points) in enumerate(drawn.items()):
        line = " ".join(place(step, value) for step, value in points.items())
        title = f"<title>{escape(name)}: {short(list(points.values())[-1])} at step {max(points):,}</title>"
        if len(points) == 1:
            x, y = line.split(",")
            parts.append(f'<circle class="c{number % 4} dot" cx="{x}" cy="{y}" r="3">{title}</circle>')
        else:
            parts.append(f'<polyline class="c{number % 4}" points="{line}">{title}</polyline>')
    return "".join([*parts, "</svg>"])


def short(value: float) -> str:
    """A number in few characters."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _thinned(curve: Curve) -> Curve:
    every = -(-len(curve) // MOST_POINTS) or 1
    kept = list(curve.items())
    return dict([*kept[:-1:every], *kept[-1:]])
