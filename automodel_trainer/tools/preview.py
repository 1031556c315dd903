"""`amt preview`: what the model really sees. The first batch, token by token: trained, masked, boundary, padding.

Everything is read off the tensors that training consumes (see the micro-batch format in ARCHITECTURE.md), nothing off
the text they came from, so a wrong mask or a lost end token shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
PARTIAL = "⋯"  # a token that holds only some bytes of a character; the character is shown at its last token
MAX_BYTES_OF_A_CHARACTER = 4
VISIBLE = str.maketrans({" ": "·", "\t": "⇥", "\n": "↵\n", "\r": "␍", "\u00a0": "⍽"})

Kind = Literal["trained", "masked", "padding"]


@dataclass(frozen=True)
class Token:
    """One place of a row: where it is, what it holds, and whether the loss counts it."""

    index: int
    id: int
    text: str
    position: int
    label: int
    special: bool
    kind: Kind

    @property
    def visible(self) -> str:
        """The text with blanks as marks; a line feed keeps its break after the mark."""
        return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in self.text.translate(VISIBLE))


@dataclass(frozen=True)
class Document:
    """A run of a row whose tokens attend to each other only; the padding that ends a row is one as well."""

    tokens: list[Token]

    @property
    def is_padding(self) -> bool:
        return self.tokens[0].kind == "padding"

    @property
    def trained(self) -> int:
        return sum(token.kind == "trained" for token in self.tokens)


@dataclass(frozen=True)
class Row:
    """One row of a micro-batch."""

    micro_batch: int
    index: int
    documents: list[Document]

    @property
    def tokens(self) -> list[Token]:
        return [token for document in self.documents for token in document.tokens]


@dataclass(frozen=True)
class PreviewCounts:
    """What a batch holds: rows and documents, and tokens of each kind (``tokens`` counts padding too)."""

    micro_batches: int
    rows: int
    documents: int
    tokens: int
    supervised: int
    padding: int

    @property
    def supervised_share(self) -> float:
        """Trained tokens, of those that are not padding."""
        return self.supervised / max(1, self.tokens - self.padding)

    @property
    def padding_share(self) -> float:
        return self.padding / max(1, self.tokens)

    def describe(self) -> str:
        return (
            f"{self.micro_batches} micro-batch{'es' if self.micro_batches != 1 else ''}, {self.rows} rows, "
            f"{self.documents} documents, {self.tokens:,} tokens: {self.supervised:,} trained "
            f"({self.supervised_share:.0%} of the text), {self.padding:,} padding ({self.padding_share:.1%})"
        )


def preview(
    micro_batches: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_rows: int = 1,
    html: str | Path | None = None,
    console: Console | None = None,
) -> PreviewCounts:
    """Print the first rows of a batch; with ``html``, write all of it as a page as well. Returns the counts."""
    from rich.console import Console as RichConsole

    console = console or RichConsole()
    console.print(render_terminal(micro_batches, tokenizer, max_rows=max_rows, marks=console.color_system is None))
    if html is not None:
        Path(html).parent.mkdir(parents=True, exist_ok=True)
        Path(html).write_text(render_html(micro_batches, tokenizer), encoding="utf-8")
        console.print(f"The whole batch: {html}", style="dim", highlight=False)
    return summarize(micro_batches)


def summarize(micro_batches: Sequence[dict[str, Any]]) -> PreviewCounts:
    """Counts of a batch, read off its tensors."""
    rows = list(read_rows(micro_batches, tokenizer=None))
    kinds = [token.kind for row in rows for token in row.tokens]
    return PreviewCounts(
        micro_batches=len(micro_batches),
        rows=len(rows),
        documents=sum(not document.is_padding for row in rows for document in row.documents),
        tokens=len(kinds),
        supervised=kinds.count("trained"),
        padding=kinds.count("padding"),
    )


def render_html(micro_batches: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole batch as one page that needs nothing else: legend, counts, and each token's id on hovering."""
    from automodel_trainer.tools.preview_html import render_page

    return render_page(list(read_rows(micro_batches, tokenizer)), summarize(micro_batches))


def read_rows(micro_batches: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    """Every row of a batch as documents of tokens; without a tokenizer the tokens have no text."""
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    for number, micro_batch in enumerate(micro_batches):
        input_ids, labels = micro_batch["input_ids"].tolist(), micro_batch["labels"].tolist()
        positions = _position_ids(micro_batch)
        masks = micro_batch["attention_mask"].tolist() if "attention_mask" in micro_batch else [None] * len(input_ids)
        for index, (ids, row_labels, row_positions, mask) in enumerate(zip(input_ids, labels, positions, masks)):
            documents = []
            for start, end in _spans(row_positions, mask):
                padding = _is_padding(ids[start:end], row_labels[start:end], mask and mask[start:end], end == len(ids))
                texts = token_texts(ids[start:end], tokenizer) if tokenizer is not None else [""] * (end - start)
                tokens = []
                for i, text in zip(range(start, end), texts):
                    kind: Kind = "padding" if padding else "masked" if row_labels[i] == IGNORED else "trained"
                    token = Token(i, ids[i], text, row_positions[i], row_labels[i], ids[i] in special, kind)
                    tokens.append(token)
                documents.append(Document(tokens))
            yield Row(number, index, documents)


def _position_ids(micro_batch: dict[str, Any]) -> list[list[int]]:
    if "position_ids" in micro_batch:
        return micro_batch["position_ids"].tolist()
    rows, length = micro_batch["input_ids"].shape
    return [list(range(length)) for _ in range(rows)]


def _spans(positions: list[int], mask: list[int] | None) -> list[tuple[int, int]]:
    """(start, end) of each document: where positions restart, or where attention ends."""
    starts = [i for i, position in enumerate(positions) if position == 0 or i == 0]
    if mask is not None:
        starts += [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    return list(pairwise([*sorted(set(starts)), len(positions)]))


def _is_padding(ids: list[int], labels: list[int], mask: list[int] | None, is_last: bool) -> bool:
    """Padding is what attention leaves out; a packed row has no mask, there it is one token repeated to the end."""
    if mask is not None and not any(mask):
        return True
    return is_last and len(set(ids)) == 1 and all(label == IGNORED for label in labels)


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the decoded text.

    A token decoded alone may lose its leading space or hold half a character, so each is decoded behind the tokens
    before it, and tokens of a character that is not complete yet show as ``PARTIAL``.
    """

    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    done = 0  # tokens before this one are shown in full
    for i in range(len(ids)):
        context = ids[max(0, done - MAX_BYTES_OF_A_CHARACTER) : done]
        text = decode(context + ids[done : i + 1])[len(decode(context)) :]
        incomplete = text.endswith("\ufffd") and i + 1 - done < MAX_BYTES_OF_A_CHARACTER and i + 1 < len(ids)
        texts.append(PARTIAL if incomplete else text)
        done = done if incomplete else i + 1
    return texts


def render_terminal(
    micro_batches: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_rows: int = 1,
    marks: bool = False,
) -> RenderableType:
    """The first rows of a batch in colour, under the counts of all of it.

    Args:
        micro_batches: what one optimizer step consumes.
        tokenizer: turns ids into text.
        max_rows: how many rows to show.
        marks: put ⟦ ⟧ around what is trained, for where there is no colour.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    parts: list[RenderableType] = [Text(summarize(micro_batches).describe()), _legend(marks), Text()]
    for row in list(read_rows(micro_batches, tokenizer))[:max_rows]:
        parts += [_row_title(row), _stripe(row), *_documents(row, marks), Text()]
    return Panel(Group(*parts[:-1]), title=Text("first batch", style="bold"), title_align="left", padding=(0, 1))


STYLES: dict[str, tuple[str, str]] = {  # two shades in turn, so that each token can be told from the next
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
    """The whole row on one line: each cell stands for as many tokens as fit, and shows the kind most of them have."""
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
        for token in run:
            style = SPECIAL_STYLES[kind] if token.special else STYLES[kind][token.index % 2]
            for is_blank, characters in groupby(token.visible, key=BLANKS.__contains__):
                text.append("".join(characters), style=f"{style} dim" if is_blank else style)
        text.append(closing)
    text.rstrip()
    return text
