"""Rows of a batch as colored text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from automodel_trainer.data.preview_rows import PARTIAL, Document, Row, read_rows, runs, summarize

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


def render_terminal(
    micro_batches: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_rows: int = 1,
    marks: bool = False,
) -> RenderableType:
    """The first rows of a batch in color, below the counts of the whole batch.

    Args:
        micro_batches: the micro-batches of one optimizer step.
        tokenizer: decodes the ids.
        max_rows: number of rows to show.
        marks: put ⟦ ⟧ around trained text, for terminals without color.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    parts: list[RenderableType] = [Text(summarize(micro_batches).describe()), _legend(marks), Text()]
    for row in list(read_rows(micro_batches, tokenizer))[:max_rows]:
        parts += [_row_title(row), _stripe(row), *_documents(row, marks), Text()]
    return Panel(Group(*parts[:-1]), title=Text("first batch", style="bold"), title_align="left", padding=(0, 1))


STYLES: dict[str, tuple[str, str]] = {  # two alternating shades, to tell neighboring tokens apart
    "trained": ("bold #eafff0 on #14683a", "bold #eafff0 on #1d8349"),
    "masked": ("#9aa3b2 on #23262d", "#9aa3b2 on #2b2f38"),
    "padding": ("#5c6370 italic", "#5c6370 italic"),
}
SPECIAL_STYLES = {"trained": "bold #fff3d6 on #9a6700", "masked": "#d7a93f on #3a2f14", "padding": "#5c6370 italic"}
BLANKS = "·↵⇥␍⍽" + PARTIAL


def _legend(marks: bool) -> Text:
    from rich.text import Text

    if marks:
        return Text("⟦trained⟧  masked (not in the loss)  ↵ line feed  · space")
    parts = [(" trained ", STYLES["trained"][0]), "  ", (" masked ", STYLES["masked"][1]), "  "]
    parts += [(" special ", SPECIAL_STYLES["trained"]), (" special, masked ", SPECIAL_STYLES["masked"])]
    return Text.assemble(*parts, ("  · space  ↵ line feed  ⋯ part of a character", "dim"))  # type: ignore[arg-type]


def _row_title(row: Row) -> Text:
    from rich.text import Text

    tokens = row.tokens
    trained = sum(token.kind == "trained" for token in tokens)
    where = f"micro-batch {row.micro_batch}, row {row.index}"
    return Text.assemble((where, "bold"), f"  {len(tokens)} tokens, {trained} trained")


def _stripe(row: Row, width: int = 96) -> Text:
    """The whole row as one line of text. Each cell stands for several tokens and shows their most frequent kind."""
    from rich.text import Text

    tokens = row.tokens
    per_cell = math.ceil(len(tokens) / width)
    stripe = Text()
    for start in range(0, len(tokens), per_cell):
        kinds = [token.kind for token in tokens[start : start + per_cell]]
        kind = max(set(kinds), key=lambda k: (kinds.count(k), k))
        glyph, colour = {"trained": ("█", "#1d8349"), "masked": ("▒", "#5a6270"), "padding": ("·", "#5c6370")}[kind]
        stripe.append(glyph, style=colour)
    return stripe


def _documents(row: Row, marks: bool) -> Iterator[RenderableType]:
    from rich.rule import Rule
    from rich.text import Text

    for number, document in enumerate(row.documents, 1):
        size = len(document.tokens)
        if document.is_padding:
            yield Rule(Text(f"padding: {size} × {document.tokens[0].visible.strip()}", style="dim"), style="dim")
            continue
        heading = f"document {number}: {size} tokens, {document.trained} trained"
        yield Rule(Text(heading, style="cyan"), style="cyan dim", align="left")
        yield _tokens(document, marks)


def _tokens(document: Document, marks: bool) -> Text:
    from rich.text import Text

    text = Text(overflow="fold")
    for kind, run in groupby(document.tokens, key=lambda token: token.kind):
        opening, closing = ("⟦", "⟧") if marks and kind == "trained" else ("", "")
        text.append(opening)
        for token, count in runs(list(run)):
            style = SPECIAL_STYLES[kind] if token.special else STYLES[kind][token.index % 2]
            text.append(f"{count:,} × " if count > 1 else "", style=style)
            for is_blank, characters in groupby(token.visible, key=BLANKS.__contains__):
                text.append("".join(characters), style=f"{style} dim" if is_blank else style)
        text.append(closing)
    text.rstrip()
    return text
