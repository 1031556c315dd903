"""Find data files: their formats, compressions and splits, by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import fsspec

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
ALLOWED = (
    "a .jsonl, .json, .parquet, .csv, .tsv, .arrow or .txt file (each also with .gz, .zst, .bz2 or .xz), a folder of "
    "them, a pattern such as 'data/*.jsonl', a URL of object storage (s3://…), a folder written by `save_to_disk`, the "
    "id of a data set on the Hugging Face Hub (`owner/name` or `owner/name:config`), a datasets.Dataset or "
    "DatasetDict, or a list of dicts"
)
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}
"""Words in the names of files and folders that mean a split. Only whole words count: contest.jsonl is no test."""

_PATTERN = re.compile(r"[*?\[]")
_WORDS = re.compile(r"[^a-z]+")


@dataclass(frozen=True)
class DataFile:
    """A file of rows.

    Attributes:
        path: its path, or its URL.
        format: one of the values of `FORMATS`.
        compression: one of the values of `COMPRESSIONS`, or None.
        split: "train", "validation" or "test"; None if its name says nothing.
    """

    path: str
    format: str
    compression: str | None
    split: str | None

    @cached_property
    def state(self) -> tuple[Any, ...]:
        """What changes when the file does: its size and its time or tag."""
        fs, path = fsspec.url_to_fs(self.path)
        info = fs.info(path)
        tag = next((str(info[key]) for key in ("mtime", "ETag", "etag", "LastModified", "updated") if key in info), "")
        return info["size"], tag


@dataclass(frozen=True)
class Found:
    """The files that a path means.

    Attributes:
        files: the data files, in order.
        others: names of files that are no data.
    """

    files: tuple[DataFile, ...]
    others: tuple[str, ...] = ()


def kind_of(name: str) -> tuple[str, str | None] | None:
    """Format and compression of a file by its name; None if it is no data file."""
    stem, ending = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(ending)
    if compression is not None:
        ending = os.path.splitext(stem)[1]
    return (FORMATS[ending], compression) if ending in FORMATS else None


def find_files(data: str | os.PathLike[str]) -> Found | None:
    """The data files that a path, a folder, a pattern or a URL means.

    A name that exists is that file or folder, whatever it has of brackets. Any other with `*`, `?` or `[` is a pattern.
    In folders, names that begin with `.` or `_` are no data: what Spark writes to `_temporary` is also a row elsewhere.

    Returns:
        None if `data` is not the name of anything that exists, nor looks like a path: it may be a Hub id.

    Raises:
        ValueError: a path that does not exist, is no data, holds none, or has an empty file; a store that cannot be
            reached.
    """
    with reaching(data):
        return _found(data)


@contextmanager
def reaching(data: object) -> Iterator[None]:
    """Turns what a store raises into a ValueError that names the URL.

    Raises:
        ValueError: the store cannot be reached, refuses, or its package is not installed.
    """
    if "://" not in str(data):
        yield
        return
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{data} cannot be read: {error}.") from error
    except Exception as error:  # each store has types of its own
        if isinstance(error, ValueError) and "://" in str(error):
            raise  # our own, which names it
        raise ValueError(
            f"{data} cannot be read: {type(error).__name__}: {error}. Look at the credentials (environment variables "
            "of the store), the name and the endpoint."
        ) from error


def _found(data: str | os.PathLike[str]) -> Found | None:
    if not str(data).strip():
        raise ValueError(f"the name of the data is empty. Allowed: {ALLOWED}.")
    text = str(data) if "://" in str(data) else os.path.expanduser(data)
    fs, path = fsspec.url_to_fs(text)
    url = "://" in text
    asked = fs.isfile(path)  # by its own name: whatever that is, it is data
    if asked:
        paths, base = [path], os.path.dirname(path)
    elif fs.isdir(path):
        paths, base = sorted(fs.find(path)), path
    elif _PATTERN.search(text):
        paths, base = sorted(p for p in fs.glob(path) if fs.isfile(p)), _before_pattern(path)
        if not paths:
            raise ValueError(f"no file matches the pattern {data}. Allowed: {ALLOWED}.")
    elif url or kind_of(text) is not None or text.startswith(("/", "./", "../", "~")):
        raise ValueError(f"no such file or folder: {data}. Allowed: {ALLOWED}.")
    else:
        return None
    named = [(p, os.path.relpath(p, base)) for p in paths]
    visible = [(p, name) for p, name in named if asked or not _begins_with(".", name)]
    left_out = [name for _, name in visible if not asked and "/_" not in f"/{text}" and _begins_with("_", name)]
    files = [
        None if name in left_out else _data_file(fs.unstrip_protocol(p) if url else p, name) for p, name in visible
    ]
    found = [file for file in files if file is not None]
    if not found:
        why = f" Names that begin with _ are left out, as Spark does: {names_of(left_out)}." if left_out else ""
        raise ValueError(f"{data} is not data that can be read.{why} Allowed: {ALLOWED}.")
    for file in found:
        try:
            empty = file.state[0] == 0
        except FileNotFoundError as error:
            raise ValueError(
                f"{file.path} is a link to a file that does not exist. Remove or mend the link."
            ) from error
        if empty:
            raise ValueError(f"{file.path} is empty. Allowed: {ALLOWED}, with at least one row.")
    return Found(tuple(found), tuple(name for (_, name), file in zip(visible, files) if file is None))


def _begins_with(mark: str, name: str) -> bool:
    """Whether a file, or a folder that it is in, has a name of bookkeeping: .git, _temporary, _delta_log."""
    return any(part.startswith(mark) for part in name.split("/"))


def _before_pattern(path: str) -> str:
    parts = path.split("/")
    first = next(index for index, part in enumerate(parts) if _PATTERN.search(part))
    return "/".join(parts[:first]) or "."


def _data_file(path: str, name: str) -> DataFile | None:
    kind = kind_of(path)
    return None if kind is None else DataFile(path, *kind, split_of(name))


def split_of(name: str) -> str | None:
    """The split that a relative path names; None if it names none.

    The file's own name goes before its folders, and a near folder before a far one. A word counts as the whole name, or
    as its first or last word: `train-00000-of-00005.parquet`, `wiki_val.jsonl`, `test/part1.csv`.

    Raises:
        ValueError: a name says two splits.
    """
    *folders, file = PurePosixPath(name.replace(os.sep, "/")).parts
    stem = file.split(".")[0] if kind_of(file) else file
    words = [word for word in _WORDS.split(stem.lower()) if word and word != "of"]
    ends = {SPLITS[word] for word in (words[:1] + words[-1:]) if word in SPLITS}
    if len(ends) > 1:
        raise ValueError(
            f"{name} names two splits ({' and '.join(sorted(ends))}). Rename it, or give train= and validation= the "
            "files themselves."
        )
    if ends:
        return ends.pop()
    return next((SPLITS[folder.lower()] for folder in reversed(folders) if folder.lower() in SPLITS), None)


def by_split(files: Iterable[DataFile]) -> tuple[dict[str, list[DataFile]], list[DataFile]]:
    """Files by split, and those left out. Without a file named for training, those without a split are for training."""
    splits: dict[str | None, list[DataFile]] = {}
    for file in files:
        splits.setdefault(file.split, []).append(file)
    unnamed = splits.pop(None, [])
    named = {name: members for name, members in splits.items() if name is not None}
    if unnamed and "train" not in named:
        return {"train": unnamed, **named}, []
    return named, unnamed


def of_one_name(files: Sequence[DataFile]) -> list[DataFile]:
    """Files beside each other that differ in format or compression alone: `a.jsonl` and `a.jsonl.gz`."""
    named: dict[str, list[DataFile]] = {}
    for file in files:
        stem = os.path.splitext(file.path)[0]
        named.setdefault(os.path.splitext(stem)[0] if file.compression else stem, []).append(file)
    return [file for group in named.values() if len(group) > 1 for file in group]


def names_of(files: Sequence[DataFile | str]) -> str:
    """Names for a message."""
    names = [os.path.basename(file.path) if isinstance(file, DataFile) else file for file in files]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
