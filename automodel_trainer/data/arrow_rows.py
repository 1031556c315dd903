"""Rows as a `datasets.Dataset` on disk: one Arrow file, written once, with every nested value as it was.

Arrow has one type for each column, and gives every struct of a column the same keys. So what people write in JSON does
not fit: `null` in one row and a list in the next, a text or a list of parts, a schema with `"default": null`. Nested
and mixed values are therefore stored as JSON (`exact_json.py`), and come back exactly as they were.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Value
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from automodel_trainer.data.exact_json import Json, exactly, json_column, text_column
from automodel_trainer.data.files import DataFile, names_of
from automodel_trainer.data.locked_folder import lock_in
from automodel_trainer.data.readers import TYPED, Row, read_rows, read_tables, schema_of

_VERSION = 2  # 1 read the quotes of csv files leniently
_FEATURES = {"bool": Value("bool"), "int": Value("int64"), "float": Value("float64"), "string": Value("string")}
Kinds = dict[str, str | None]


def dataset_of_rows(rows: Sequence[Row]) -> Dataset:
    """Rows in memory as a `Dataset`. Nested values are kept exactly.

    Raises:
        ValueError: a column's name is no text, or a value is none of JSON's. The message names the row.
    """
    kinds: Kinds = {}
    _widen(kinds, rows)
    if (odd := next((name for name in kinds if not isinstance(name, str)), None)) is not None:
        raise ValueError(f"the rows have a column {odd!r}, and the names of columns are texts.")
    schema = _schema(kinds)
    columns = [_column(rows, name, kinds, lambda number: f"row {number} of the data") for name in kinds]
    return exactly(Dataset(pa.table(columns, schema=schema)))


def dataset_of_files(files: Sequence[DataFile]) -> tuple[Dataset, list[tuple[int, str]]]:
    """The rows of files, one file after the other, and where each file begins: (row, path).

    They are written to the cache of `datasets` once, and read from there again while the files are unchanged.

    Raises:
        ValueError: a file cannot be read, or there is no space. The message names the file and the row.
    """
    identity = [(file.path, file.format, file.compression) for file in files]
    states = [[str(part) for part in file.state] for file in files]
    root = Path(datasets.config.HF_DATASETS_CACHE) / "automodel_trainer"
    name = hashlib.sha256(json.dumps([_VERSION, identity]).encode()).hexdigest()[:32]
    root, lock = lock_in(
        root,
        name,
        lambda error, temporary: (
            f"The cache of datasets cannot be written ({error}): {names_of(files)} is read into {temporary} for this "
            "run only. Set HF_HOME or HF_DATASETS_CACHE to a folder that can be written to keep it."
        ),
    )
    with lock:
        target, note = root / f"{name}.arrow", root / f"{name}.json"
        known = json.loads(note.read_text()) if note.is_file() and target.is_file() else None
        if known is not None and known["states"] != states:
            changed = [file for file, then, now in zip(files, known["states"], states) if then != now]
            rank_zero_info(f"{names_of(changed)} changed since it was read last: it is read again.")
            known = None
        if known is None:
            starts = _write(files, target)
            note.write_text(json.dumps({"states": states, "starts": starts}))
            known = {"starts": starts}
    return exactly(Dataset.from_file(str(target))), [(int(row), path) for row, path in known["starts"]]


def has_exact_values(features: Features, column: str) -> bool:
    """Whether the values of a column are those that the user wrote, and no `null` in them was added by Arrow."""
    return isinstance(features.get(column), datasets.Json)


def _write(files: Sequence[DataFile], target: Path) -> list[tuple[int, str]]:
    """Write the rows of files as one Arrow file. Returns where each file begins."""
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        typed = all(file.format in TYPED for file in files) and _common_schema(files)
        starts = _write_tables(files, typed, temporary) if typed else _write_rows(files, temporary)
        os.replace(temporary, target)
        return starts
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(no_space(target.parent, names_of(files), "HF_HOME or HF_DATASETS_CACHE")) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def no_space(folder: Path, what: str, variable: str) -> str:
    """What to tell a user whose disk is full."""
    free = shutil.disk_usage(folder).free
    return (
        f"There is no space to write {what} to {folder} ({free / 2**30:.1f} GiB free). Make room, or set {variable} to "
        "a folder on a larger disk."
    )


# --- typed files: as they are -----------------------------------------------------------------------------------------


def _common_schema(files: Sequence[DataFile]) -> pa.Schema | None:
    """A schema that holds the rows of all files; None if there is none."""
    schemas = [schema_of(file) for file in files]
    try:
        schema = pa.unify_schemas([s.remove_metadata() for s in schemas], promote_options="permissive")
        return Features.from_arrow_schema(schemas[0] if schema == schemas[0].remove_metadata() else schema).arrow_schema
    except (pa.ArrowException, ValueError, KeyError):
        return None


def _write_tables(files: Sequence[DataFile], schema: pa.Schema, target: Path) -> list[tuple[int, str]]:
    starts, row = [], 0
    empty = schema.remove_metadata().empty_table()
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for file in files:
            starts.append((row, file.path))
            for table in read_tables(file):
                wide = pa.concat_tables([empty, table.replace_schema_metadata()], promote_options="permissive")
                writer.write_table(wide.select(schema.names).cast(schema))
                row += len(table)
    return starts


# --- all others: row by row -------------------------------------------------------------------------------------------


class _Wider(Exception):
    """A row does not fit the columns that earlier rows had."""


def _write_rows(files: Sequence[DataFile], target: Path) -> list[tuple[int, str]]:
    kinds: Kinds = {}
    for rows in _batches(files):
        _widen(kinds, rows)
        break
    try:
        return _write_batches(files, kinds, target)
    except _Wider:  # rare: look at every row first
        for rows in _batches(files):
            _widen(kinds, rows)
        return _write_batches(files, kinds, target)


def _write_batches(files: Sequence[DataFile], kinds: Kinds, target: Path) -> list[tuple[int, str]]:
    starts: list[tuple[int, str]] = []
    written = 0
    schema = _schema(kinds)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for rows in _batches(files, lambda path: starts.append((written, path))):  # noqa: B023  # as it is when called
            seen = dict(kinds)
            if _widen(seen, rows):
                raise _Wider
            place = partial(_place, starts[-1], written)
            writer.write_table(pa.table([_column(rows, name, kinds, place) for name in kinds], schema=schema))
            written += len(rows)
    return starts


def _place(file: tuple[int, str], written: int, number: int) -> str:
    """Where a row of a batch stands: its file, and its number in it."""
    start, path = file
    return f"{path} row {written - start + number + 1}"


def _batches(files: Iterable[DataFile], begin: Callable[[str], Any] = lambda path: None) -> Iterator[list[Row]]:
    for file in files:
        begin(file.path)
        for rows in read_rows(file):
            yield _without_added_keys(rows) if file.format in TYPED else rows


def _without_added_keys(rows: list[Row]) -> list[Row]:
    """Rows of a typed file beside others: nested nulls are Arrow's, so they are dropped before they become JSON."""
    return [{name: without_none(value) for name, value in row.items()} for row in rows]


def without_none(value: Any) -> Any:
    """`value` without the keys whose value is None, at every depth."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    if type(value) is int:
        return "int" if -(2**63) <= value < 2**63 else "json"
    return {bool: "bool", float: "float", str: "string"}.get(type(value), "json")


def _widen(kinds: Kinds, rows: Iterable[Row]) -> bool:
    """Let `kinds` hold these rows too. Returns whether they did not before."""
    changed = False
    for row in rows:
        for name, value in row.items():
            kind, known = _kind(value), kinds.get(name)
            if name in kinds and (kind is None or kind == known):
                continue
            wide = kind if known is None else known if kind is None else _common(known, kind)
            changed |= name not in kinds or wide != known
            kinds[name] = wide
    return changed


def _common(one: str, other: str) -> str:
    return one if one == other else "float" if {one, other} == {"int", "float"} else "json"


def _schema(kinds: Kinds) -> pa.Schema:
    features = {name: Json() if kind == "json" else _FEATURES[kind or "string"] for name, kind in kinds.items()}
    return Features(features).arrow_schema


def _column(rows: Sequence[Row], name: str, kinds: Kinds, place: Callable[[int], str]) -> pa.Array:
    """A column of some rows; `place` says where one of them stands, for messages."""
    values = [row.get(name) for row in rows]
    try:
        return _array(values, kinds[name])
    except ValueError as error:
        number = next(i for i, value in enumerate(values) if _fault(value, kinds[name]))
        raise ValueError(f"{place(number)}, column {name!r}: {error}") from error


def _fault(value: Any, kind: str | None) -> bool:
    try:
        _array([value], kind)
    except ValueError:
        return True
    return False


def _array(values: Sequence[Any], kind: str | None) -> pa.Array:
    if kind == "json":
        return json_column(values)
    return text_column(values) if kind in ("string", None) else pa.array(values, _FEATURES[kind].pa_type)
