"""A heat map as an SVG text: rows and columns of numbers, each a coloured square."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

CELL, LEFT, TOP = 8, 130, 40  # pixels


def heat_map(rows: Sequence[tuple[str, Sequence[float]]], title: str, middle: float = 1.0) -> str:
    """Draw numbers as squares: white at `middle`, blue below it down to 0, red above it up to twice `middle`.

    Args:
        rows: the name of each row, and its numbers. Rows may differ in length.
        title: one line above the picture.
    """
    columns = max((len(values) for _, values in rows), default=0)
    width, height = LEFT + CELL * columns + 10, TOP + CELL * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
    ]
    for index, (name, values) in enumerate(rows):
        y = TOP + CELL * index
        parts.append(f'<text x="8" y="{y + CELL - 1}" font-size="8">{escape(name)}</text>')
        for column, value in enumerate(values):
            x = LEFT + CELL * column
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{_color(value / middle)}">'
                f"<title>{escape(name)}, {column}: {value:.2f}</title></rect>"
            )
    return "\n".join([*parts, "</svg>\n"])


def _color(value: float) -> str:
    """The color of a number: white at 1, blue towards 0, red towards 2 and beyond."""
    strength = min(abs(value - 1.0), 1.0)
    fading = round(255 * (1 - strength))
    return f"rgb({fading},{fading},255)" if value < 1 else f"rgb(255,{fading},{fading})"
