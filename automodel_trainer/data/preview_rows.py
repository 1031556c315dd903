"""Read the rows of a batch as documents of tokens that are trained, masked or padding.

We use only the tensors that training consumes (ARCHITECTURE.md describes the format), never the original text. So a
wrong mask or a missing end token becomes visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal

from automodel_trainer.nn.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTIAL = "⋯"  # shown for a token with some bytes of a character; the character is shown at its last token
MAX_BYTES_OF_A_CHARACTER = 4  # in UTF-8
LONG_RUN = 16  # so many equal tokens in a row, such as those of a picture, are shown once
VISIBLE = str.maketrans({" ": "·", "\t": "⇥", "\n": "↵\n", "\r": "␍", "\u00a0": "⍽"})

Kind = Literal["trained", "masked", "padding"]


@dataclass(frozen=True)
class Token:
    """One token of a row.

    Attributes:
        index: index in the row.
        id: token id.
        text: the text that it adds.
        position: its position id.
        label: its label; -100 = not trained.
        special: whether it is a special token.
        kind: "trained", "masked" or "padding".
    """

    index: int
    id: int
    text: str
    position: int
    label: int
    special: bool
    kind: Kind

    @property
    def visible(self) -> str:
        """The text with marks for white space; a line feed also breaks the line after its mark."""
        return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in self.text.translate(VISIBLE))


@dataclass(frozen=True)
class Document:
    """Consecutive tokens of a row that attend only to each other. The padding at the end of a row is one, too.

    Attributes:
        tokens: its tokens.
        sample_id: the row of the data that it comes from; None: from none, or it is not known.
    """

    tokens: list[Token]
    sample_id: int | None = None

    @property
    def is_padding(self) -> bool:
        """Whether this is the padding at the end of a row."""
        return self.tokens[0].kind == "padding"

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return sum(token.kind == "trained" for token in self.tokens)


@dataclass(frozen=True)
class Row:
    """One row of a micro-batch.

    Attributes:
        micro_batch: index of the micro-batch in the step.
        index: index of the row in the micro-batch.
        documents: its documents, and its padding.
    """

    micro_batch: int
    index: int
    documents: list[Document]

    @property
    def tokens(self) -> list[Token]:
        """All tokens of the row."""
        return [token for document in self.documents for token in document.tokens]


@dataclass(frozen=True)
class PreviewCounts:
    """Counts of a batch: rows, documents, and tokens of each kind. `tokens` includes padding."""

    micro_batches: int
    rows: int
    documents: int
    tokens: int
    supervised: int
    padding: int

    @property
    def supervised_share(self) -> float:
        """Share of trained tokens among those that are not padding, from 0 to 1."""
        return self.supervised / max(1, self.tokens - self.padding)

    @property
    def padding_share(self) -> float:
        """Share of padding among all tokens, from 0 to 1."""
        return self.padding / max(1, self.tokens)

    def describe(self) -> str:
        """The counts in one line of text."""
        return (
            f"{self.micro_batches} micro-batch{'es' if self.micro_batches != 1 else ''}, {self.rows} rows, "
            f"{self.documents} documents, {self.tokens:,} tokens: {self.supervised:,} trained "
            f"({self.supervised_share:.0%} of the text), {self.padding:,} padding ({self.padding_share:.1%})"
        )


def summarize(micro_batches: Sequence[dict[str, Any]]) -> PreviewCounts:
    """Count the rows, documents and tokens of a batch."""
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
    """Yield every row of a batch as documents of tokens.

    Args:
        micro_batches: the micro-batches; `input_ids`, `labels`, `position_ids` and `attention_mask` are `[b, s]`.
        tokenizer: decodes the ids. None: the tokens have no text.
    """
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    for number, micro_batch in enumerate(micro_batches):
        input_ids, labels = micro_batch["input_ids"].tolist(), micro_batch["labels"].tolist()
        positions, samples = _position_ids(micro_batch), iter(micro_batch.get("sample_ids", ()))
        masks = micro_batch["attention_mask"].tolist() if "attention_mask" in micro_batch else [None] * len(input_ids)
        for index, (ids, row_labels, row_positions, mask) in enumerate(zip(input_ids, labels, positions, masks)):
            documents = []
            for start, end in _spans(row_positions, mask):
                padding = _is_padding(ids[start:end], row_labels[start:end], mask and mask[start:end], end == len(ids))
                texts = token_texts(ids[start:end], tokenizer) if tokenizer is not None else [""] * (end - start)
                tokens = []
                for i, text in zip(range(start, end), texts):
                    kind: Kind = "padding" if padding else "masked" if row_labels[i] == IGNORE_INDEX else "trained"
                    token = Token(i, ids[i], text, row_positions[i], row_labels[i], ids[i] in special, kind)
                    tokens.append(token)
                documents.append(Document(tokens, None if padding else next(samples, None)))
            yield Row(number, index, documents)


def runs(tokens: Sequence[Token]) -> Iterator[tuple[Token, int]]:
    """Tokens with how often each is shown for: long runs of one masked token, as of a picture, come once."""
    for _, group in groupby(tokens, key=lambda token: (token.id, token.kind)):
        run = list(group)
        if len(run) >= LONG_RUN and run[0].kind == "masked":
            yield run[0], len(run)
        else:
            yield from ((token, 1) for token in run)


def _position_ids(micro_batch: dict[str, Any]) -> list[list[int]]:
    if "position_ids" in micro_batch:
        positions = micro_batch["position_ids"]
        return (positions if positions.ndim == 2 else positions[0]).tolist()  # several for a token: the first count it
    rows, length = micro_batch["input_ids"].shape
    return [list(range(length)) for _ in range(rows)]


def _spans(positions: list[int], mask: list[int] | None) -> list[tuple[int, int]]:
    """(start, end) of each document. A document begins where positions restart or the attention mask changes."""
    starts = [i for i, position in enumerate(positions) if position == 0 or i == 0]
    if mask is not None:
        starts += [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    return list(pairwise([*sorted(set(starts)), len(positions)]))


def _is_padding(ids: list[int], labels: list[int], mask: list[int] | None, is_last: bool) -> bool:
    """Whether these tokens are padding.

    Padding is masked out of attention. A packed row has no mask; its padding is one token id, repeated to the end of
    the row and never trained.
    """
    if mask is not None and not any(mask):
        return True
    return is_last and len(set(ids)) == 1 and all(label == IGNORE_INDEX for label in labels)


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds to the decoded text.

    A token that is decoded alone may lose its leading space or contain half a character. We therefore decode each one
    together with the tokens before it. Tokens of a character that is not complete yet are shown as `PARTIAL`.
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
