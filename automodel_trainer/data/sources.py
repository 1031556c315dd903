"""Load rows from files, folders, saved data sets, Hub ids and Python objects, always as a `datasets.Dataset`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.utils import are_progress_bars_disabled

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
ALLOWED = (
    "a .jsonl, .json, .parquet or .txt file, a folder of them, a folder written by `save_to_disk`, the id of a data "
    "set on the Hugging Face Hub (`owner/name` or `owner/name:config`), a datasets.Dataset or DatasetDict, or a list "
    "of dicts"
)
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
"""Split names that mean validation. A test split is never used for validation."""


def load_rows(data: Any, split: str = "train") -> Dataset:
    """Load the rows of one split of a data source.

    Args:
        data: a path, a Hub id (`owner/name` or `owner/name:config`), a `Dataset`, a `DatasetDict` or a list of dicts.
        split: "train", "validation" or "test". For a source with one split or none, all its rows are returned.

    Returns:
        The rows, at least one.

    Raises:
        ValueError: a file is missing or unreadable, the split does not exist, there are no rows, or `data` is of an
            unsupported type.
    """
    splits = _open(data)
    if isinstance(splits, Dataset):
        rows = splits
    else:
        name = _split_name(splits, split)
        if name is None:
            raise ValueError(
                f"{_name(data)} has no {split!r} split; it has {sorted(splits)}. Give a data set with that split, or "
                f"one split as a datasets.Dataset."
            )
        rows = splits[name]
    if len(rows) == 0:
        raise ValueError(f"{_name(data)} has no rows ({split}). Allowed: {ALLOWED}, with at least one row.")
    return rows


def load_validation_rows(data: Any) -> Dataset | None:
    """The validation split of a training source; None if it has none.

    Raises:
        ValueError: as `load_rows`.
    """
    splits = _open(data)
    name = None if isinstance(splits, Dataset) else _split_name(splits, "validation", alone=False)
    return None if name is None else load_rows(splits[name])


def open_stream(data: Any, split: str = "train") -> IterableDataset:
    """Open a source as a stream, which is read during training and never loaded whole.

    Args:
        data: a source as for `load_rows`, or an `IterableDataset` or `IterableDatasetDict`.
        split: "train", "validation" or "test".

    Raises:
        ValueError: as `load_rows`, as far as it is known without reading the rows.
    """
    if isinstance(data, IterableDataset):
        return data
    if isinstance(data, IterableDatasetDict):
        if split not in data:
            raise ValueError(f"the streamed data set has no {split!r} split; it has {sorted(data)}.")
        return data[split]
    if isinstance(data, str | os.PathLike) and not _is_saved(Path(data).expanduser()):
        stream = _load(data, streaming=True)
        return stream if isinstance(stream, IterableDataset) else open_stream(stream, split)
    return load_rows(data, split).to_iterable_dataset()


def fingerprint(rows: Dataset) -> str:
    """A hash of the content of the rows. It does not depend on where or when they were written."""
    digest = hashlib.blake2b(repr(rows.features).encode(), digest_size=16)
    for table in rows.with_format("arrow").iter(batch_size=1000):
        table = table.combine_chunks().replace_schema_metadata()  # chunks and metadata are not content
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _open(data: Any) -> Dataset | DatasetDict:
    if isinstance(data, Dataset | DatasetDict):
        return data
    if isinstance(data, IterableDataset | IterableDatasetDict):
        raise ValueError(
            "a streamed data set (IterableDataset) works only with TextDataModule(streaming=True). Use it, or load the "
            "data set without streaming."
        )
    if isinstance(data, list) and all(isinstance(row, dict) for row in data):
        if not data:
            raise ValueError(f"the list of rows is empty. Allowed: {ALLOWED}, with at least one row.")
        return Dataset.from_list(data)
    if isinstance(data, str | os.PathLike):
        path = Path(data).expanduser()
        return load_from_disk(str(path)) if _is_saved(path) else _load(data)
    raise ValueError(f"cannot read data from {type(data).__name__}: {str(data)[:80]!r}. Allowed: {ALLOWED}.")


def _load(data: str | os.PathLike[str], streaming: bool = False) -> Any:
    """Open a path or Hub id with `load_dataset`. Every failure becomes a ValueError that names the cause."""
    path = Path(data).expanduser()
    if path.exists():
        files = _data_files(path)
        arguments = _file_arguments(path, files)
    elif path.suffix in BUILDERS or str(data).startswith(("/", "./", "../", "~")):
        raise ValueError(f"no such file or folder: {data}. Allowed: {ALLOWED}.")
    else:
        files = []
        name, _, config = str(data).partition(":")
        arguments = {"path": name, "name": config or None}
    with quiet():
        try:
            return load_dataset(**arguments, streaming=streaming)
        except Exception as error:  # datasets raises many types here, including Hub and network errors
            raise ValueError(_explain(data, files, error)) from error


def _data_files(path: Path) -> list[Path]:
    """The data files of a file or folder. Raises a ValueError if there is none, or if one is empty."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in BUILDERS and p.is_file())
    if not files or files[0].suffix not in BUILDERS:
        raise ValueError(f"{path} is not data that can be read. Allowed: {ALLOWED}.")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty. Allowed: {ALLOWED}, with at least one row.")
    return files


def _file_arguments(path: Path, files: list[Path]) -> dict[str, Any]:
    builder = BUILDERS[files[0].suffix]
    # A text file is one document, not one document per line.
    extra = {"sample_by": "document"} if builder == "text" else {}
    if path.is_file():
        return {"path": builder, "data_files": {"train": [str(path)]}, "split": "train", **extra}
    # For a folder, `load_dataset` finds the splits by the names of files and folders (train*, validation*, ...).
    return {"path": str(path), **extra}


def _explain(data: object, files: list[Path], error: Exception) -> str:
    for file in files:
        if fault := _json_fault(file):
            return f"{fault}. Allowed: {ALLOWED}."
    cause = error.__cause__ or error
    where = "cannot be read" if files else "is neither a local path nor a data set that can be loaded from the Hub"
    return f"{data} {where}: {type(cause).__name__}: {cause}. Allowed: {ALLOWED}."


def _json_fault(file: Path) -> str | None:
    """A description of the first error in a JSON file; None if it is valid, or not a JSON file."""
    if BUILDERS[file.suffix] != "json":
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"{file} is not UTF-8 text ({error.reason} at byte {error.start})"
    chunks: Iterator[tuple[int, str]]
    chunks = enumerate(text.split("\n"), start=1) if file.suffix == ".jsonl" else iter([(1, text)])
    for line, chunk in chunks:
        try:
            if chunk.strip():
                json.loads(chunk)
        except json.JSONDecodeError as error:
            return f"{file} line {line + error.lineno - 1} is not valid JSON: {error.msg} at column {error.colno}"
    return None


def _split_name(splits: DatasetDict, split: str, alone: bool = True) -> str | None:
    """The name of `split` in `splits`; None if there is none. With `alone`, a single split stands for any split."""
    names = VALIDATION_NAMES if split == "validation" else (split,)
    found = next((name for name in names if name in splits), None)
    return next(iter(splits)) if found is None and alone and len(splits) == 1 else found


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _name(data: object) -> str:
    return str(data) if isinstance(data, str | os.PathLike) else f"the given {type(data).__name__}"


class quiet:
    """A context manager that hides the progress bars of `datasets`: opening or saving a file does not need one."""

    def __enter__(self) -> None:
        self.were_disabled = are_progress_bars_disabled()
        disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if not self.were_disabled:
            enable_progress_bars()
