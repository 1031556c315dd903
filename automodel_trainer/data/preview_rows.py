"""The rows of a batch as documents of tokens: trained, masked, boundary, padding.

Everything is read off the tensors that training consumes (see the micro-batch format in ARCHITECTURE.md), nothing off
the text they came from, so a wrong mask or a lost end token shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
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
