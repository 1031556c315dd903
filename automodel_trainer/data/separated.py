"""Rows of csv and tsv files: lines of cells under a header.

Quotes are read strictly. A lenient reader turns `"Hi" she said` into `Hi she said`, and a quote that is never closed
into one cell with everything up to the next quote.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

from automodel_trainer.data.fault import Fault

_LONGEST_CELL = 2**31 - 1  # a C long, everywhere


def separated_rows(stream: BinaryIO, path: str, delimiter: str) -> Iterator[dict[str, str]]:
    """The rows of a file; every value is a text.

    A header with semicolons and no comma is that of a spreadsheet where the comma is a decimal sign.

    Raises:
        ValueError: names the line.
    """
    csv.field_size_limit(_LONGEST_CELL)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    skipped, header = _first_line(text)
    if delimiter == "," and "," not in header and ";" in header:
        delimiter = ";"
    lines = _cells(csv.reader(chain([header], text), delimiter=delimiter, strict=True), path, skipped)
    _, names = next(lines, (1, []))
    if len(set(names)) < len(names):
        raise Fault(f"{path} has two columns of one name: {names}.")
    for number, cells in lines:
        if len(cells) != len(names):
            raise Fault(
                f"{path} line {number} has {len(cells)} cells, and the header has {len(names)}: {str(cells)[:80]}. A "
                f"cell with {delimiter!r} or a line break in it must be in double quotes."
            )
        yield dict(zip(names, cells))


def _first_line(text: io.TextIOWrapper) -> tuple[int, str]:
    """The number of empty lines at the beginning, and the line after them."""
    skipped = 0
    while (line := text.readline()) and not line.strip():
        skipped += 1
    return skipped, line


def _cells(reader: Any, path: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Of each line that is not empty: its number in the file, and its cells."""
    while True:
        number = skipped + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Fault(f"{path} line {number} is not valid: {_explained(str(error))}") from None
        if cells:
            yield number, cells


def _explained(error: str) -> str:
    if "unexpected end of data" in error:
        return "a cell begins with a double quote there, and no other quote ends it."
    if "expected after" in error:
        return (
            "a cell begins with a double quote, and goes on after the quote that ends it. A cell that has quotes must "
            'be in quotes, and these doubled: "say ""hi""".'
        )
    return f"{error}."
