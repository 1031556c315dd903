"""Files of tokens: Megatron's `.bin` with `.idx`, and plain `.bin` as nanoGPT and llm.c write them. Memory-mapped."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from automodel_trainer.data.batches import Document

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents
_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_LLMC = {20240520: np.uint16, 20240801: np.uint32}  # magic numbers of llm.c: its header is 256 int32
_HIGH_HALVES = 4  # the high halves of ids below 2^18 are less
_SAMPLE = 1024  # numbers of a part that is looked at: an even number
PIECE = 1 << 16  # tokens of a piece, where documents are not told apart


class TokenFile:
    """The documents of a file of tokens. The interface is `TokenStore`'s.

    Args:
        path: a `.bin` file, or a Megatron prefix (the path without `.bin`).
        end: id of the token that ends a document, to find the documents of a plain file; None: they are not told apart.
        dtype: of a plain file without a header: "uint16" or "uint32". None: uint16, unless its tokens look wider.

    Attributes:
        lengths: tokens of each piece, int64 `[n]`.
        sample_ids: the document that each piece belongs to, int64 `[n]`.
        documents: number of documents.

    Raises:
        ValueError: a file is missing, damaged, or of another format or width.
    """

    def __init__(self, path: str | os.PathLike[str], end: int | None = None, dtype: str | None = None) -> None:
        text = os.fspath(path)
        prefix = text.removesuffix(".bin").removesuffix(".idx")
        self.path, self.index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        if not self.path.is_file():
            raise ValueError(f"no file of tokens: {self.path}. Give a .bin file, or the prefix of .bin and .idx.")
        if self.path.stat().st_size == 0:
            raise ValueError(f"{self.path} holds no tokens.")
        if self.index.is_file():
            self._read_index()
        else:
            self._read_plain(end, dtype)
        self.documents = int(self.sample_ids[-1]) + 1 if len(self.lengths) else 0
        if self.documents == 0:
            raise ValueError(f"{self.path} holds no tokens.")

    def _read_index(self) -> None:
        data = self.index.read_bytes()
        if len(data) < _HEADER.size or not data.startswith(MAGIC):
            raise ValueError(f"{self.index} is no index of Megatron: it does not begin with {MAGIC!r}.")
        _, version, code, sequences, count = _HEADER.unpack_from(data)
        if version != 1 or code not in _CODES:
            raise ValueError(
                f"{self.index} has version {version} and dtype code {code}. Known: 1, and {sorted(_CODES)}."
            )
        if len(data) < _HEADER.size + sequences * 12 + count * 8:
            raise ValueError(f"{self.index} is cut off: {len(data):,} bytes for {sequences:,} sequences.")
        lengths = np.frombuffer(data, np.int32, sequences, _HEADER.size)
        self._starts = np.frombuffer(data, np.int64, sequences, _HEADER.size + 4 * sequences)
        bounds = np.frombuffer(data, np.int64, count, _HEADER.size + 12 * sequences)
        dtype = np.dtype(_CODES[code])
        self._tokens = np.memmap(self.path, dtype, "r")
        self._starts = self._starts // dtype.itemsize
        self.lengths = lengths.astype(np.int64)
        if sequences and int((self._starts + self.lengths).max()) > len(self._tokens):
            raise ValueError(f"{self.path} is shorter than {self.index} says: it is cut off, or of another index.")
        self.sample_ids = (
            np.searchsorted(bounds, np.arange(sequences), side="right") - 1
        )  # the document of each sequence

    def _read_plain(self, end: int | None, dtype: str | None) -> None:
        header = np.fromfile(self.path, np.int32, 256)
        kind = _LLMC.get(int(header[0])) if len(header) == 256 else None
        offset = 1024 if kind is not None else 0
        chosen = np.dtype(kind or dtype or np.uint16)
        size = self.path.stat().st_size - offset
        if size % chosen.itemsize:
            raise ValueError(
                f"{self.path} is no whole number of {chosen} tokens: {size:,} bytes of tokens, {chosen.itemsize} each. "
                "Copy it again if it is cut off, or set token_dtype to what it holds (allowed: 'uint16', 'uint32')."
            )
        self._tokens = np.memmap(self.path, chosen, "r", offset)
        if kind is None and dtype is None:
            self._refuse_wider()
        total = len(self._tokens)
        ends = [np.arange(PIECE, total, PIECE), [total]]
        stops = np.empty(0, np.int64)
        if end is not None:
            chunks = range(0, total, 1 << 24)
            found = [np.flatnonzero(self._tokens[start : start + (1 << 24)] == end) + start + 1 for start in chunks]
            stops = np.concatenate(found) if found else stops
        bounds = np.unique(np.concatenate([*ends, stops]).astype(np.int64)) if total else np.empty(0, np.int64)
        self._starts = np.concatenate([[0], bounds[:-1]]).astype(np.int64) if total else bounds
        self.lengths = bounds - self._starts
        self.sample_ids = np.searchsorted(stops, self._starts, side="right")

    def _refuse_wider(self) -> None:
        """Refuse a file that was read as uint16 and holds wider numbers: every second one would be a false token."""
        if not _looks_wider(self._tokens):
            return
        text = (
            f"{self.path} has no header, and is read as uint16 without token_dtype. But almost every second number is "
        )
        if _looks_wider(self._tokens.view(np.uint32)):
            raise ValueError(
                f"{text}0, as in tokens of 8 bytes. Allowed: uint16 and uint32. Write it anew: "
                "np.fromfile(path, np.int64).astype(np.uint32).tofile(new), and set token_dtype='uint32'."
            )
        raise ValueError(
            f"{text}below {_HIGH_HALVES}, as in tokens of 4 bytes. Set token_dtype='uint32', or token_dtype='uint16' "
            "if these are its tokens."
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, indices: Sequence[int]) -> list[Document]:
        """The documents, or pieces of them, with these indices."""
        found = []
        for index in indices:
            start = int(self._starts[index])
            ids = np.asarray(self._tokens[start : start + int(self.lengths[index])], dtype=np.int64)
            found.append(Document(ids, np.ones(len(ids), dtype=bool), int(self.sample_ids[index])))
        return found

    def pieces_of(self, first: int, last: int) -> np.ndarray:
        """Indices of the pieces of the documents from `first` up to, without, `last`; those that are empty left out."""
        return np.flatnonzero((self.sample_ids >= first) & (self.sample_ids < last) & (self.lengths > 0))

    def highest(self) -> tuple[int, int]:
        """The highest token id, and the document that has it. Of more than a billion tokens, a sample is looked at.

        Raises:
            ValueError: a token is negative.
        """
        step = max(1, len(self._tokens) // (1 << 30))
        found, place = -1, 0
        for start in range(0, len(self._tokens), 1 << 24):
            part = self._tokens[start : start + (1 << 24) : step]
            if np.issubdtype(part.dtype, np.signedinteger) and int(part.min()) < 0:
                raise ValueError(
                    f"Document {self._document_at(start + int(part.argmin()) * step)} of {self.path} has token "
                    f"{int(part.min())}. Tokens are 0 or more: {self.index} may be of another file, or name another "
                    "dtype."
                )
            if int(part.max()) > found:
                found, place = int(part.max()), start + int(part.argmax()) * step
        return found, self._document_at(place)

    def _document_at(self, place: int) -> int:
        piece = int(np.searchsorted(self._starts, place, side="right")) - 1
        return int(self.sample_ids[max(0, piece)])

    @property
    def fingerprint(self) -> str:
        """A hash of the index, the size, and samples of the tokens."""
        digest = hashlib.sha256(f"{len(self._tokens)} {self._tokens.dtype} {len(self)}".encode())
        digest.update(np.ascontiguousarray(self.lengths[:: max(1, len(self) // 65536)]).tobytes())
        for part in range(64):
            start = len(self._tokens) * part // 64
            digest.update(self._tokens[start : start + 4096].tobytes())
        return digest.hexdigest()[:32]


def _looks_wider(numbers: np.ndarray) -> bool:
    """Whether numbers are the halves of wider ones: almost every second is small, and the others are not. A sample."""
    if len(numbers) < 16 or len(numbers) % 2:
        return False
    starts = range(0, len(numbers), max(_SAMPLE, len(numbers) // 128 * 2))
    pairs = np.concatenate([numbers[start : start + _SAMPLE] for start in starts]).reshape(-1, 2)
    return any(
        (pairs[:, 1] < bound).mean() >= 0.99 and (pairs[:, 0] < bound).mean() < 0.75 for bound in (1, _HIGH_HALVES)
    )


class TokenFileWriter:
    """Writes `.bin` and `.idx` as Megatron reads them, under temporary names until `close`.

    Args:
        prefix: the path without an ending.
        vocabulary: number of token ids: up to 65,536 a token takes two bytes, else four.
    """

    def __init__(self, prefix: Path, vocabulary: int) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
        self.lengths: list[int] = []
        self._temporary = Path(f"{prefix}.bin.tmp")
        self._file = self._temporary.open("wb")

    def add(self, lengths: Iterable[int], tokens: np.ndarray) -> None:
        """Add documents: the tokens of all of them, one after the other."""
        self.lengths += lengths
        self._file.write(tokens.astype(self.dtype, copy=False).tobytes())

    @property
    def bytes(self) -> int:
        """Bytes of tokens written."""
        return self._file.tell()

    def close(self) -> None:
        """Write the index, and give both files their names."""
        self._file.close()
        lengths = np.array(self.lengths, np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]]) * self.dtype.itemsize
        code = next(code for code, dtype in _CODES.items() if np.dtype(dtype) == self.dtype)
        header = _HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1)
        bounds = np.arange(len(lengths) + 1, dtype=np.int64)
        index = Path(f"{self.prefix}.idx")
        Path(f"{index}.tmp").write_bytes(
            header + lengths.tobytes() + starts.astype(np.int64).tobytes() + bounds.tobytes()
        )
        os.replace(self._temporary, f"{self.prefix}.bin")
        os.replace(f"{index}.tmp", index)

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, validation and test in Megatron's form: "969,30,1".

    Raises:
        ValueError: it is anything else.
    """
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts, default=-1) < 0 or sum(parts) <= 0:
        raise ValueError(f"split={split!r} is no split. Allowed: up to three numbers, such as '969,30,1' or '1'.")
    parts += [0.0] * (3 - len(parts))
    return tuple(part / sum(parts) for part in parts)  # type: ignore[return-value]
