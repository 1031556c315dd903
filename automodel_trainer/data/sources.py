"""Load rows from files, folders, saved data sets, Hub ids and Python objects, always as a `datasets.Dataset`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

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
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.data.arrow_rows import dataset_of_files, dataset_of_rows
from automodel_trainer.data.exact_json import exactly
from automodel_trainer.data.files import ALLOWED, DataFile, Found, by_split, find_files, names_of, of_one_name
from automodel_trainer.data.readers import Row, read_rows

_STREAMED: WeakKeyDictionary[IterableDataset, list[DataFile]] = WeakKeyDictionary()
_PLACES: WeakKeyDictionary[Dataset, list[tuple[int, str]]] = WeakKeyDictionary()
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
    splits = _open(data, split)
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
    if rows.format["type"] == "custom":
        raise ValueError(
            "the Dataset has a transform (set_transform or with_transform), which datasets applies to what is read and "
            "which would be left out here. Apply it with .map(…), or remove it with .with_format(None)."
        )
    if len(rows) == 0:
        raise ValueError(f"{_name(data)} has no rows ({split}). Allowed: {ALLOWED}, with at least one row.")
    return keep_places(exactly(rows), rows)


def load_validation_rows(data: Any) -> Dataset | None:
    """The validation split of a training source; None if it has none.

    Raises:
        ValueError: as `load_rows`.
    """
    found = _files(data)
    if found is not None:
        files = by_split(found.files)[0].get("validation")
        return _read(files) if files else None
    splits = _open(data, "validation")
    name = None if isinstance(splits, Dataset) else _split_name(splits, "validation", alone=False)
    return None if name is None else load_rows(splits[name])


def places_of(rows: Dataset) -> list[tuple[int, str]] | None:
    """Where each file begins in rows that were read from files: (row, path). None for other rows."""
    return _PLACES.get(rows)


def keep_places(rows: Dataset, of: Dataset) -> Dataset:
    """`rows`, which came from `of` row by row, with its places."""
    if (places := places_of(of)) is not None:
        _PLACES[rows] = places
    return rows


def file_of(places: Sequence[tuple[int, str]], index: int) -> tuple[int, str]:
    """The file that a row came from: the number of its first row, and its path."""
    return next((start, path) for start, path in reversed(places) if start <= index)


def describe_place(places: Sequence[tuple[int, str]] | None, index: int) -> str:
    """Where a row came from, for messages; `places` is what `places_of` returned. Rows count from 0."""
    if not places:
        return f"row {index} of the data"
    start, path = file_of(places, index)
    if len(places) == 1:
        return f"row {index} of the data ({path})"
    return f"row {index} of the data (row {index - start} of {path})"


def refuse_other_columns(rows: Dataset, wanted: Sequence[str]) -> None:
    """Raise ValueError if rows came from several files, and a wanted column has values in some of them and not in all.

    Args:
        rows: the data.
        wanted: columns that every row needs.
    """
    places = places_of(rows) or []
    ends = [*(start for start, _ in places[1:]), len(rows)]
    parts = [(start, end, path) for (start, path), end in zip(places, ends) if end > start]
    if len(parts) < 2:
        return
    lacking = next((part for part in parts if any(_all_null(rows, part, column) for column in wanted)), None)
    if lacking is None:
        return
    missing = [column for column in wanted if _all_null(rows, lacking, column)]
    other = next((part for part in parts if not any(_all_null(rows, part, column) for column in missing)), None)
    if other is None:
        return
    (_, _, one), (_, _, two) = other, lacking
    raise ValueError(
        f"the files have different columns: {one} has {_columns(rows, other)}, and {two} has "
        f"{_columns(rows, lacking)}, without {missing}. Files of one folder or pattern are read as one table of one "
        f"format. Make them a mixture (train: [{{path: {os.path.basename(one)}}}, {{path: {os.path.basename(two)}}}]), "
        "or put them into separate folders."
    )


def _all_null(rows: Dataset, part: tuple[int, int, str], column: str) -> bool:
    """Whether a column has no value in the rows of a file. Most often the first row says no."""
    start, end, _ = part
    chosen = rows.select_columns([column]).with_format("arrow")
    return all(chosen[a:b][column].null_count == b - a for a, b in ((start, start + 1), (start, end)))


def _columns(rows: Dataset, part: tuple[int, int, str]) -> list[str]:
    return [column for column in rows.column_names if not _all_null(rows, part, column)]


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
    if (found := _files(data)) is not None:
        files = _of_split(data, found, split)
        stream = IterableDataset.from_generator(_rows_of, gen_kwargs={"files": files})
        _STREAMED[stream] = files
        return stream
    if isinstance(data, str | os.PathLike) and not _is_saved(Path(data).expanduser()):
        stream = _load(data, streaming=True)
        return stream if isinstance(stream, IterableDataset) else open_stream(stream, split)
    return load_rows(data, split).to_iterable_dataset()


def files_of_stream(stream: IterableDataset) -> list[DataFile]:
    """The files that a stream reads, in order; empty if it reads no files of ours."""
    return _STREAMED.get(stream, [])


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


class PlacedRow(dict[str, Any]):
    """A row that knows where it stands, for messages."""

    place: str


def _rows_of(files: list[DataFile]) -> Iterator[Row]:
    for file in files:
        for number, row in enumerate(chain.from_iterable(read_rows(file))):
            placed = PlacedRow(row)
            placed.place = f"row {number} of {file.path}"
            yield placed


def _open(data: Any, split: str) -> Dataset | DatasetDict:
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
        return dataset_of_rows(data)
    if isinstance(data, str | os.PathLike):
        if (found := _files(data)) is not None:
            return _read(_of_split(data, found, split))
        path = Path(data).expanduser()
        return load_from_disk(str(path)) if _is_saved(path) else _load(data)
    several = isinstance(data, dict | list) and len(data) > 0  # sources, or rows that are no dicts
    hint = " Several sources are a mixture: train: [{path: …, name: …}, …]." if several else ""
    raise ValueError(f"cannot read data from {type(data).__name__}: {str(data)[:80]!r}.{hint} Allowed: {ALLOWED}.")


def _files(data: Any) -> Found | None:
    """The files that `data` names; None if it names none, or a folder that `datasets` itself describes."""
    if not isinstance(data, str | os.PathLike):
        return None
    path = Path(data).expanduser()
    return None if _is_saved(path) or _is_described(path) else find_files(data)


def _of_split(data: object, found: Found, split: str) -> list[DataFile]:
    """The files of one split. What is left out is said."""
    splits, unnamed = by_split(found.files)
    if split not in splits and len(splits) == 1:  # a single split stands for any
        split = next(iter(splits))
    if split not in splits:
        raise ValueError(
            f"{data} has no {split!r} split; its files are of {sorted(splits)}. Give the file or folder of that split."
        )
    if unnamed:
        rank_zero_warn(
            f"{data}: {names_of(unnamed)} left out: other files are named for a split (train, validation, test), and "
            "these are not. Name them, or give a pattern that matches all."
        )
    if copies := of_one_name(splits[split]):
        rank_zero_warn(
            f"{data}: {names_of(copies)} have one name in several formats, and all are read. If they are copies, their "
            "rows are trained twice: keep one of each, or give a pattern that matches one format."
        )
    rest = [file for name, files in splits.items() for file in files if name not in (split, "validation")]
    said = [text for text in (names_of(rest), names_of(found.others)) if text]
    if said and split == "train":
        rank_zero_info(f"{data}: training does not read {', '.join(said)}.")
    return splits[split]


def _read(files: Sequence[DataFile]) -> Dataset:
    rows, places = dataset_of_files(files)
    _PLACES[rows] = places
    return rows


def _load(data: str | os.PathLike[str], streaming: bool = False) -> Any:
    """Open a folder that `datasets` describes, or a Hub id. Every failure becomes a ValueError that names the cause."""
    local = Path(data).expanduser().exists()
    name, _, config = (str(data), "", "") if local else str(data).partition(":")
    with quiet():
        try:
            return load_dataset(path=name, name=config or None, streaming=streaming)
        except Exception as error:  # datasets raises many types here, including Hub and network errors
            raise ValueError(_explain(data, local, error)) from error


def _explain(data: object, local: bool, error: Exception) -> str:
    cause = error.__cause__ or error
    if local:
        return f"{data} cannot be read: {type(cause).__name__}: {cause}. Allowed: {ALLOWED}."
    offline = " HF_HUB_OFFLINE is set, so only what was loaded before is there." if _is_offline() else ""
    return (
        f"{data} is neither a local path nor a data set that can be loaded from the Hub: {type(cause).__name__}: "
        f"{cause}.{offline} Allowed: {ALLOWED}."
    )


def _is_offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def _is_described(path: Path) -> bool:
    """Whether a folder's README says which files are what, as repositories of data sets on the Hub do."""
    card = path / "README.md"
    if not card.is_file():
        return False
    head, _, _ = card.read_text(encoding="utf-8", errors="replace").removeprefix("---").partition("\n---")
    return "\nconfigs:" in head


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
