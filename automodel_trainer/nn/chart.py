"""A curve, or several, as an SVG text. A page may style it by its classes; without a style it looks right, too."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from html import escape

Curve = dict[int, float]
"""Optimizer step → value; of a step that was logged twice, the later one."""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 190, 62, 24, 10
MOST_POINTS = 600  # of a curve; of more, evenly spread ones are drawn
COLOURS = ("#3b6fd4", "#d9772b", "#2da160", "#a457b8")  # in turn; each is seen on white and on black


def chart(curves: Mapping[str, Curve], dots: Container[str] = (), last_step: int = 0, points: int = MOST_POINTS) -> str:
    """Draw curves over the steps, with the last value of each; "" if there is nothing to draw.

    Args:
        curves: the values by name.
        dots: names of curves that are drawn as dots instead of a line.
        last_step: where the axis ends at least.
        points: the most that are drawn of a curve.
    """
    drawn = {name: kept for name, curve in curves.items() if (kept := _thinned(finite(curve), points))}
    if not drawn:
        return ""
    steps = [step for curve in drawn.values() for step in curve]
    values = [value for curve in drawn.values() for value in curve.values()]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    first, last = min(steps), max(max(steps), min(steps) + 1, last_step)

    def place(step: int, value: float) -> tuple[float, float]:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 8)
        return round(x, 1), round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(drawn))}">']
    for share in (0.0, 0.5, 1.0):
        value = low + (high - low) * share
        x, y = place(first, value)
        parts.append(f'<path class="grid" stroke="#8885" d="M{x} {y}H{WIDTH - 8}"/>')
        parts.append(_tick(LEFT - 6, y + 4, short(value), "end"))
    parts += [_tick(LEFT, HEIGHT - 6, f"{first:,}"), _tick(WIDTH - 8, HEIGHT - 6, f"step {last:,}", "end")]
    for number, name in enumerate(curves):
        curve = drawn.get(name, {})
        if not curve:
            continue
        title = f"<title>{escape(name)}: {short(list(curve.values())[-1])} at step {max(curve):,}</title>"
        places = [place(step, value) for step, value in curve.items()]
        css, colour = f"c{number % len(COLOURS)}", COLOURS[number % len(COLOURS)]
        if len(places) == 1 or name in dots:
            parts += [
                f'<circle class="{css} dot" fill="{colour}" stroke="{colour}" cx="{x}" cy="{y}" r="3">{title}</circle>'
                for x, y in places
            ]
        else:
            line = " ".join(f"{x},{y}" for x, y in places)
            stroke = f'fill="none" stroke="{colour}" stroke-width="1.8"'
            parts.append(f'<polyline class="{css}" {stroke} points="{line}">{title}</polyline>')
    return "".join([*parts, "</svg>"])


def short(value: float) -> str:
    """A number in few characters."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def finite(curve: Curve) -> Curve:
    """The points that can be drawn."""
    return {step: value for step, value in curve.items() if math.isfinite(value)}


def _tick(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="tick" fill="#888" font-size="11" x="{x}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _thinned(curve: Curve, points: int) -> Curve:
    every = -(-len(curve) // points) or 1
    kept = list(curve.items())
    return dict([*kept[:-1:every], *kept[-1:]])
