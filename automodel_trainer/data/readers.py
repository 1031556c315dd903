"""Read the rows of a data file, batch by batch. Every error names the file and the row."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import shlex
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from automodel_trainer.data.fault import Fault
from automodel_trainer.data.files import DataFile, reaching
from automodel_trainer.data.separated import separated_rows

Row = dict[str, Any]
ROWS = 1000  # rows of a batch

_WRAPPERS = ("data", "rows", "examples", "instances")  # keys of a .json file that hold its rows, beside others
TYPED = ("parquet", "arrow")  # these formats say the types of their columns


def read_rows(file: DataFile) -> Iterator[list[Row]]:
    """The rows of a file as Python values, in batches.

    Values are exactly those of a JSON file. Those of csv and tsv are texts: `007` keeps its zeros. A text file is one
    row with the column `text`.

    Raises:
        ValueError: names the file, and the row where one is at fault.
    """
    if file.format in TYPED:
        for table in read_tables(file):
            yield table.to_pylist()
        return
    reader: Callable[[BinaryIO, str], Iterator[list[Row]]] = _READERS[file.format]
    with _Named(file), opened(file) as stream:
        yield from reader(stream, file.path)


def read_tables(file: DataFile) -> Iterator[pa.Table]:
    """The rows of a parquet or arrow file as tables.

    Raises:
        ValueError: names the file.
    """
    with _Named(file), opened(file) as stream:
        source = stream if file.compression is None else pa.BufferReader(stream.read())
        if file.format == "parquet":
            parquet = pq.ParquetFile(source)
            schema, batches = parquet.schema_arrow, parquet.iter_batches(ROWS)
        else:
            reader = _ipc(source)
            schema, batches = reader.schema, _ipc_batches(reader)
        _refuse_equal_names(schema, file.path)
        for batch in batches:
            yield _without_dictionaries(pa.Table.from_batches([batch]))


def schema_of(file: DataFile) -> pa.Schema:
    """The schema of a parquet or arrow file.

    Raises:
        ValueError: names the file.
    """
    with _Named(file), opened(file) as stream:
        source = stream if file.compression is None else pa.BufferReader(stream.read())
        schema = pq.ParquetFile(source).schema_arrow if file.format == "parquet" else _ipc(source).schema
        return pa.schema([field.with_type(_decoded(field.type)) for field in schema], schema.metadata)


def _refuse_equal_names(schema: pa.Schema, path: str) -> None:
    if len(set(schema.names)) < len(schema.names):  # as Python values one of them would be lost
        raise Fault(f"{path} has two columns of one name: {schema.names}.")


def _without_dictionaries(table: pa.Table) -> pa.Table:
    """A table whose dictionary-encoded columns (pandas' categories) are columns of their values."""
    for number, field in enumerate(table.schema):
        if (kind := _decoded(field.type)) != field.type:
            table = table.set_column(number, field.with_type(kind), table.column(number).cast(kind))
    return table


def _decoded(kind: pa.DataType) -> pa.DataType:
    """A type with the types of their values in place of dictionaries, at every depth."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_decoded(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_decoded(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_decoded(kind.value_type)))
    return kind


def opened(file: DataFile) -> BinaryIO:
    """The file's bytes, decompressed."""
    raw = fsspec.open(file.path, "rb").open()
    if file.compression == "gzip":
        return gzip.open(raw)  # type: ignore[return-value]
    if file.compression == "bz2":
        return bz2.open(raw)  # type: ignore[return-value]
    if file.compression == "xz":
        return lzma.open(raw)  # type: ignore[return-value]
    if file.compression == "zstd":
        return io.BufferedReader(_Readable(pa.CompressedInputStream(raw, "zstd")))  # type: ignore[arg-type]
    return raw  # type: ignore[no-any-return]


class _Readable(io.RawIOBase):
    """Arrow's stream as Python's, which knows lines."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Named:
    """Turns what readers raise into a ValueError that names the file."""

    def __init__(self, file: DataFile) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError) and (text := _encoding_fault(self.file, error)):
            raise ValueError(text) from None
        if isinstance(error, Fault):
            raise ValueError(str(error)) from None
        if "://" in self.file.path and isinstance(error, Exception):
            with reaching(self.file.path):
                raise error
        if isinstance(error, (OSError, EOFError, ValueError, lzma.LZMAError, pa.ArrowException)):
            if isinstance(error, OSError) and error.errno is not None:
                return  # the disk's own: permission, no space
            raise ValueError(f"{self.file.path} cannot be read: {type(error).__name__}: {error}") from error


def _encoding_fault(file: DataFile, error: ValueError) -> str | None:
    """What to say if a file of text could not be read because it is not UTF-8; None if that was not the reason."""
    if file.format in TYPED:
        return None
    encoding = "latin1"
    with opened(file) as stream:
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            encoding = "utf-16"
        elif not isinstance(error, UnicodeDecodeError):
            return None
    if (found := _first_bad_byte(file)) is None:
        return None
    line, offset, byte = found
    unpack = "Decompress it, and convert" if file.compression else "Convert"
    guess = "" if encoding == "utf-16" else ", with its encoding in place of latin1 if it is another"
    return (
        f"{file.path} line {line} is not UTF-8 text: byte {offset:,} of the file is 0x{byte:02x}. {unpack} it{guess}: "
        f"iconv -f {encoding} -t utf-8 {shlex.quote(os.path.basename(file.path))} > converted"
    )


def _first_bad_byte(file: DataFile) -> tuple[int, int, int] | None:
    """Line, offset and value of the first byte that is not UTF-8; None if all are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, start = 1, 0
    with opened(file) as stream:
        while True:
            data = stream.read(1 << 20)
            kept = decoder.getstate()[0]  # of a character that the last part cut
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = error.start - len(kept)
                return line + data[: max(0, place)].count(b"\n"), start + place, (kept + data)[error.start]
            if not data:
                return None
            line += data.count(b"\n")
            start += len(data)


def _ipc(source: Any) -> Any:
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source)


def _ipc_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from reader


def _jsonl(stream: BinaryIO, path: str) -> Iterator[list[Row]]:
    rows: list[Row] = []
    first = stream.read(64)
    start = first.lstrip(b"\xef\xbb\xbf").lstrip()
    lines = _lines(stream, first)
    if start.startswith(b"["):  # a JSON array under the name of lines
        yield from _json(io.BytesIO(b"".join(lines)), path)
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        rows.append(_row(_parsed(line, path, number), f"{path} line {number}"))
        if len(rows) == ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


def _lines(stream: BinaryIO, first: bytes) -> Iterator[bytes]:
    *whole, rest = first.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    yield from (line + b"\n" for line in whole)
    yield rest + stream.readline()
    yield from stream


def _parsed(line: bytes, path: str, number: int) -> Any:
    try:
        return json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise Fault(
            f"{path} line {number + error.lineno - 1} is not valid JSON: {error.msg} at column {error.colno}."
        ) from None


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise Fault(f"{place} holds a {type(value).__name__}, and a row is an object with columns: {str(value)[:80]}")
    return value


def _json(stream: BinaryIO, path: str) -> Iterator[list[Row]]:
    """A list of rows, one row, or columns; a file of lines that is called .json is read as such."""
    text = stream.read().removeprefix(b"\xef\xbb\xbf")
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        if text.lstrip().startswith(b"{") and b"\n" in text.strip():
            yield from _jsonl(io.BytesIO(text), path)
            return
        value = _parsed(text, path, 1)
    if isinstance(value, dict):
        lists = [
            name for name, items in value.items() if isinstance(items, list) and items and isinstance(items[0], dict)
        ]
        alone = len(value) == 1 and lists[:1] not in (["messages"], ["conversations"])
        if lists and (alone or (len(lists) == 1 and lists[0] in _WRAPPERS)):
            value = value[lists[0]]  # {"version": 1, "data": [rows]}
        else:
            value = [value]
    if not isinstance(value, list):
        raise Fault(f"{path} holds a {type(value).__name__}. A .json file is a list of rows.")
    rows = [_row(item, f"{path} row {number}") for number, item in enumerate(value, start=1)]
    yield from (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))


def _csv(stream: BinaryIO, path: str, delimiter: str = ",") -> Iterator[list[Row]]:
    rows = separated_rows(stream, path, delimiter)
    while batch := list(islice(rows, ROWS)):
        yield batch


def _tsv(stream: BinaryIO, path: str) -> Iterator[list[Row]]:
    return _csv(stream, path, "\t")


def _text(stream: BinaryIO, path: str) -> Iterator[list[Row]]:
    yield [{"text": stream.read().decode("utf-8-sig")}]


_READERS: dict[str, Any] = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _tsv, "text": _text}
