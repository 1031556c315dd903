"""`amt tokenize`: write raw text as shards of tokens (Megatron's .bin and .idx), on all cores.

amt tokenize 'corpus/*.jsonl.zst' --tokenizer my-model --output tokens/
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from automodel_trainer.checkpoint.writable import check_folder
from automodel_trainer.data.documents import check_text, document_end, encode_documents
from automodel_trainer.data.files import ALLOWED, DataFile, find_files, names_of
from automodel_trainer.data.in_processes import in_processes
from automodel_trainer.data.readers import read_rows
from automodel_trainer.data.token_files import TokenFileWriter
from automodel_trainer.data.unknown_tokens import SHARE, unknown_id

CHARACTERS = 1 << 20  # of the texts that a process tokenizes at a time


def tokenize_files(
    data: str,
    tokenizer: str,
    output: Path,
    column: str = "text",
    workers: int | None = None,
    shard_bytes: int = 2 << 30,
) -> dict[str, Any]:
    """Tokenize texts and write them in their order. Memory is bounded by a few megabytes for each process.

    Args:
        data: a file, folder, pattern or URL of texts.
        tokenizer: folder or Hub id of a tokenizer.
        output: the folder for the shards; it must not hold any.
        column: the column with the text.
        workers: processes; None: one for each core.
        shard_bytes: size of a shard's tokens.

    Returns:
        `tokens`, `documents`, `without_text` (rows left out), `unknown` (tokens), `seconds`, and the prefixes of the
        `shards`.

    Raises:
        ValueError: no data, no such column, no EOS token, or `output` holds shards.
    """
    found = find_files(data)
    if found is None:
        raise ValueError(f"no such file or folder: {data}. Allowed: {ALLOWED}.")
    check_folder(output, "Shards")
    output.mkdir(parents=True, exist_ok=True)
    if there := sorted(output.glob("*.bin")):
        raise ValueError(f"{output} holds {names_of([file.name for file in there])}: give an empty folder.")
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    document_end(loaded)
    count = workers or len(os.sched_getaffinity(0))
    begun, shards = time.monotonic(), _Shards(output, len(loaded), shard_bytes)
    texts = _Texts(found.files, column)
    unknown, unknown_token = 0, unknown_id(loaded)
    with _bar() as bar:
        task = bar.add_task("tokenizing", total=len(found.files), speed="")
        try:
            for lengths, tokens in in_processes(_encode, loaded, texts.parts(), count):
                shards.add(lengths, tokens)
                unknown += 0 if unknown_token is None else int((tokens == unknown_token).sum())
                speed = shards.tokens / max(1e-9, time.monotonic() - begun)
                said = f"{shards.tokens:,} tokens, {speed:,.0f} tokens/s"
                bar.update(task, completed=texts.files_read, speed=said)
            shards.close()
        except BaseException:
            shards.abandon()
            raise
        bar.update(task, completed=len(found.files))
    if shards.tokens == 0:
        raise ValueError(f"no row of {data} has any text in column {column!r}.")
    return {
        "tokens": shards.tokens,
        "documents": shards.documents,
        "without_text": texts.rows - shards.documents,
        "unknown": unknown,
        "seconds": time.monotonic() - begun,
        "shards": shards.prefixes,
    }


class _Shards:
    """Writes shard after shard."""

    def __init__(self, output: Path, vocabulary: int, limit: int) -> None:
        self.output, self.vocabulary, self.limit = output, vocabulary, limit
        self.tokens = self.documents = 0
        self.prefixes: list[Path] = []
        self._writer: TokenFileWriter | None = None

    def add(self, lengths: list[int], tokens: np.ndarray) -> None:
        """Add the tokens of some documents."""
        if self._writer is None:
            self.prefixes.append(self.output / f"shard-{len(self.prefixes):05d}")
            self._writer = TokenFileWriter(self.prefixes[-1], self.vocabulary)
        self._writer.add(lengths, tokens)
        self.tokens, self.documents = self.tokens + len(tokens), self.documents + len(lengths)
        if self._writer.bytes >= self.limit:
            self.close()

    def close(self) -> None:
        """Complete the shard that is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def abandon(self) -> None:
        """Remove the shard that is open."""
        if self._writer is not None:
            self._writer.abandon()


class _Texts:
    """The texts of files.

    Attributes:
        files_read: files that were read to their end so far.
        rows: rows read so far, also those without a text.
    """

    def __init__(self, files: Sequence[DataFile], column: str) -> None:
        self.files, self.column = files, column
        self.files_read = self.rows = 0

    def parts(self) -> Iterator[list[str]]:
        """The texts in parts of about `CHARACTERS` characters."""
        part: list[str] = []
        size = 0
        for text in self._texts():
            part.append(text)
            size += len(text)
            if size >= CHARACTERS:
                yield part
                part, size = [], 0
        if part:
            yield part

    def _texts(self) -> Iterator[str]:
        for file in self.files:
            before = self.rows
            for rows in read_rows(file):
                if rows and not any(self.column in row for row in rows):
                    raise ValueError(f"{file.path} has no column {self.column!r}; its columns are {sorted(rows[0])}.")
                for row in rows:
                    self.rows += 1
                    place = f"row {self.rows - before} of {file.path}"
                    if text := check_text(row.get(self.column), self.column, place):
                        yield text
            self.files_read += 1


def _encode(tokenizer: Any, texts: list[str]) -> tuple[list[int], np.ndarray]:
    documents = encode_documents(tokenizer, texts)  # type: ignore[arg-type]
    lengths = [len(ids) for ids in documents]
    tokens = np.fromiter((token for ids in documents for token in ids), np.uint32, sum(lengths))
    return lengths, tokens


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("files {task.fields[speed]}"),
        TimeRemainingColumn(), transient=True,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="amt tokenize", description="Write raw text as shards of tokens, on all cores."
    )
    parser.add_argument(
        "data", help="a file, folder, pattern or URL of texts (jsonl, parquet, csv, txt, …, compressed)"
    )
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of a tokenizer or model")
    parser.add_argument("--output", required=True, type=Path, help="the folder for the shards")
    parser.add_argument("--column", default="text", help="the column with the text (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="size of a shard (default: %(default)s)")
    args = parser.parse_args(argv)
    shard_bytes = int(args.shard_gb * 2**30)
    done = tokenize_files(args.data, args.tokenizer, args.output, args.column, args.workers, shard_bytes)
    speed = done["tokens"] / done["seconds"]
    if missing := done["without_text"]:
        print(f"{missing:,} rows have no text in column {args.column!r} and were left out.")
    if (share := done["unknown"] / done["tokens"]) >= SHARE:
        print(f"{share:.1%} of the tokens are the unknown token: the tokenizer has no tokens for this text.")
    print(
        f"{done['tokens']:,} tokens of {done['documents']:,} documents in {len(done['shards'])} shard(s) in "
        f"{args.output} ({speed:,.0f} tokens/s). Train on them with TokenDataModule(train={str(args.output)!r})."
    )
