"""Where rows come from: local files and folders, saved data sets, hub ids and objects, all as `datasets.Dataset`."""

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
    "set on the Hugging Face hub (`owner/name` or `owner/name:config`), a datasets.Dataset or DatasetDict, or a list "
    "of dicts"
)
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
"""Split names that mean validation. A test split is never one of them: it is kept for `test`."""


def load_rows(data: Any, split: str = "train") -> Dataset:
    """The rows of one split of a data source.

    Args:
        data: a path, a hub id (`owner/name` or `owner/name:config`), a `Dataset`, a `DatasetDict` or a list of dicts.
        split: "train", "validation" or "test". A source without splits is taken whole, whatever the split.

    Returns:
        The rows, at least one.

    Raises:
        ValueError: a missing or unreadable file, an unknown split, no rows, or an object that is no data source.
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
    """The validation split that comes with a training source, None where it has none."""
    splits = _open(data)
    name = None if isinstance(splits, Dataset) else _split_name(splits, "validation", alone=False)
    return None if name is None else load_rows(splits[name])


def open_stream(data: Any, split: str = "train") -> IterableDataset:
    """The rows of a source as a stream that is read while training and never held whole.

    Raises:
        ValueError: as `load_rows`, for what is known without reading the rows.
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
    """A hash of the content of the rows: the same rows give the same hash wherever they lie and whenever written."""
    digest = hashlib.blake2b(repr(rows.features).encode(), digest_size=16)
    for table in rows.with_format("arrow").iter(batch_size=1000):
        table = table.combine_chunks().replace_schema_metadata()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _open(data: Any) -> Dataset | DatasetDict:
    if isinstance(data, Dataset | DatasetDict):
        return data
    if isinstance(data, IterableDataset | IterableDatasetDict):
        raise ValueError("a streamed data set (IterableDataset) is only taken by TextDataModule(streaming=True).")
    if isinstance(data, list) and all(isinstance(row, dict) for row in data):
        if not data:
            raise ValueError(f"the list of rows is empty. Allowed: {ALLOWED}, with at least one row.")
        return Dataset.from_list(data)
    if isinstance(data, str | os.PathLike):
        path = Path(data).expanduser()
        return load_from_disk(str(path)) if _is_saved(path) else _load(data)
    raise ValueError(f"cannot read data from {type(data).__name__}: {str(data)[:80]!r}. Allowed: {ALLOWED}.")


def _load(data: str | os.PathLike[str], streaming: bool = False) -> Any:
    """Open a path or hub id with `load_dataset`; every failure becomes a ValueError that names the culprit."""
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
        except Exception as error:  # datasets raises many types here, hub and network errors among them
            raise ValueError(_explain(data, files, error)) from error


def _data_files(path: Path) -> list[Path]:
    """The data files of a file or folder, none of them empty."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in BUILDERS and p.is_file())
    if not files or files[0].suffix not in BUILDERS:
        raise ValueError(f"{path} is not data that can be read. Allowed: {ALLOWED}.")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty. Allowed: {ALLOWED}, with at least one row.")
    return files


def _file_arguments(path: Path, files: list[Path]) -> dict[str, Any]:
    builder = BUILDERS[files[0].suffix]
    # A text file is one document, however many lines it has.
    extra = {"sample_by": "document"} if builder == "text" else {}
    if path.is_file():
        return {"path": builder, "data_files": {"train": [str(path)]}, "split": "train", **extra}
    # Given a folder, `load_dataset` finds the splits by the names of files and folders (train*, validation*, ...).
    return {"path": str(path), **extra}


def _explain(data: object, files: list[Path], error: Exception) -> str:
    for file in files:
        if fault := _json_fault(file):
            return f"{fault}. Allowed: {ALLOWED}."
    cause = error.__cause__ or error
    where = "cannot be read" if files else "is neither a local path nor a data set that can be loaded from the hub"
    return f"{data} {where}: {type(cause).__name__}: {cause}. Allowed: {ALLOWED}."


def _json_fault(file: Path) -> str | None:
    """Where a json file is broken, None if it is well-formed (or no json file)."""
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
            return f"{file} line {line + error.lineno - 1} is not valid json: {error.msg} at column {error.colno}"
    return None


def _split_name(splits: DatasetDict, split: str, alone: bool = True) -> str | None:
    """The name `split` has in `splits`; a data set with a single split serves for any (where `alone`)."""
    names = VALIDATION_NAMES if split == "validation" else (split,)
    found = next((name for name in names if name in splits), None)
    return next(iter(splits)) if found is None and alone and len(splits) == 1 else found


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _name(data: object) -> str:
    return str(data) if isinstance(data, str | os.PathLike) else f"the given {type(data).__name__}"


class quiet:
    """No progress bars of `datasets` within: opening and saving files is not worth one each."""

    def __enter__(self) -> None:
        self.were_disabled = are_progress_bars_disabled()
        disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if not self.were_disabled:
            enable_progress_bars()
