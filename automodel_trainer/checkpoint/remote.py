"""Copies of local checkpoints in object storage (`s3://`, `gs://`, and every other protocol of fsspec).

Object storage writes each object atomically. The manifest is uploaded last, so a prefix is a checkpoint if and only if
it has a manifest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec
import torch.distributed as dist
from filelock import FileLock
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.checkpoint.clock import note
from automodel_trainer.checkpoint.folder import TEMPORARY
from automodel_trainer.checkpoint.manifest import MANIFEST, check_checkpoint, read_manifest
from automodel_trainer.checkpoint.places import Share
from automodel_trainer.checkpoint.runs import BEST, created
from automodel_trainer.data.cache import cache_root
from automodel_trainer.distributed.agreement import on_all_ranks, rank, world_size

P = ParamSpec("P")
T = TypeVar("T")
_STEP = re.compile(r"step-\d+")


def is_remote(path: object) -> bool:
    """Whether a path is a URL of object storage."""
    return "://" in str(path)


def scratch(url: str) -> Path:
    """The local folder for what is written to, or read from, `url`: below the cache, the same on every rank."""
    return cache_root() / "remote" / re.sub(r"[^\w.=-]+", "_", url)


def local_root(path: str | os.PathLike[str]) -> Path:
    """The local folder of a Trainer's `default_root_dir`, which may be a URL of object storage."""
    return scratch(str(path)) if is_remote(path) else Path(path)


def local_only(path: str | os.PathLike[str], what: str) -> Path:
    """A path that must be local.

    Raises:
        ValueError: it is a URL.
    """
    if is_remote(path):
        raise ValueError(f"{what} writes to a local folder, not to {path}. Give a local folder and copy it there.")
    return Path(path)


def _os_error(method: Callable[P, T]) -> Callable[P, T]:
    """Turn the errors that are specific to a store into OSErrors, which callers report or retry."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise OSError(f"{args[0]}: {type(error).__name__}: {error}") from error

    return call


class RemoteRuns:
    """The runs `url`, `url-v1`, … in a store. All methods raise OSError if the store fails.

    Args:
        url: URL of the first run. Credentials and endpoint come from the store's usual environment variables.

    Raises:
        ValueError: fsspec does not know the protocol, or the package for it is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{url!r} cannot be used for checkpoints: {error}. Allowed: a local folder, or a URL whose protocol "
                "fsspec supports (s3://, gs://, …)."
            ) from error

    def __str__(self) -> str:
        return self.url

    @_os_error
    def check_writable(self) -> None:
        """Write a small object and remove it, so that missing credentials are noticed before training."""
        place = self._path("", f".write-test-{os.getpid()}")
        self._fs.pipe_file(place, b"test")
        self._fs.rm_file(place)

    @_os_error
    def is_folder(self) -> bool:
        """Whether there are objects below the URL."""
        return bool(self._fs.isdir(self._root))

    @_os_error
    def upload(self, share: Share, run: str, checkpoint: str) -> None:
        """Upload a share of a checkpoint's files, without the manifest. Objects left by a crash are replaced.

        Args:
            share: the files.
            run: suffix of the run: "" for the first, "-v1" for the second, …
            checkpoint: name of the checkpoint.
        """
        for name, entry in sorted(share.files.items()):
            target = self._path(run, checkpoint, name)
            self._fs.put_file(str(share.source / name), target)
            if (size := self._fs.info(target)["size"]) != entry["size"]:
                raise OSError(f"{target} has {size:,} bytes, but {entry['size']:,} were uploaded")

    @_os_error
    def withdraw(self, run: str, name: str) -> None:
        """Remove a checkpoint or the remains of one, the manifest first: without it, it is no checkpoint."""
        place = self._path(run, name)
        self._fs.invalidate_cache()
        if self._fs.exists(f"{place}/{MANIFEST}"):
            self._fs.rm_file(f"{place}/{MANIFEST}")
        if self._fs.exists(place):
            self._fs.rm(place, recursive=True)

    @_os_error
    def commit(self, folder: Path, run: str) -> None:
        """Upload the manifest, which completes the checkpoint."""
        self._fs.put_file(str(folder / MANIFEST), self._path(run, folder.name, MANIFEST))

    @_os_error
    def tidy(self, run: str, keep: Iterable[str], links: dict[str, str]) -> None:
        """Write the targets of links, then remove checkpoints that are not kept and the remains of crashed uploads.

        Args:
            run: suffix of the run.
            keep: names of the checkpoints to keep.
            links: maps names of links (`latest`, `best`) to names of checkpoints.
        """
        for link, name in links.items():
            self._fs.pipe_file(self._path(run, link), name.encode())
        self._fs.invalidate_cache()
        for name in set(self._steps(run)) - set(keep):
            self.withdraw(run, name)

    @_os_error
    def runs(self) -> list[str]:
        """The suffixes of all runs that have checkpoints, the oldest run first."""
        parent, _, base = self._root.rpartition("/")
        self._fs.invalidate_cache()
        names = [path.rstrip("/").rpartition("/")[2] for path in self._list(parent)]
        numbered = [(re.fullmatch(re.escape(base) + r"(-v\d+)?", name), name) for name in names]
        found = [match[1] or "" for match, _ in numbered if match]
        return [run for run in sorted(found, key=_number) if self._whole(run)]

    @_os_error
    def newest(self) -> list[tuple[str, str]]:
        """All checkpoints as (run suffix, name), the newest first."""
        found = [(self._created(run, name), run, name) for run in self.runs() for name in self._whole(run)]
        return [(run, name) for _, run, name in sorted(found, reverse=True)]

    @_os_error
    def target(self, link: str) -> tuple[str, str] | None:
        """The checkpoint (run suffix, name) that `best` or `latest` names in the newest run that has such a link."""
        for run in reversed(self.runs()):
            if self._fs.exists(self._path(run, link)):
                return run, self._fs.cat_file(self._path(run, link)).decode()
        return None

    @_os_error
    def download(self, run: str, name: str, folder: Path) -> None:
        """Download a checkpoint into `folder`, unless it is there and complete.

        One process of a machine downloads under a file lock; the others wait.

        Raises:
            ValueError: the manifest is damaged.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + TEMPORARY + ".lock")):
            manifest = json.loads(self._fs.cat_file(self._path(run, name, MANIFEST)))
            if folder.is_dir() and _same(folder, manifest):
                return
            part = folder.with_name(folder.name + TEMPORARY)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            (part / MANIFEST).write_bytes(self._fs.cat_file(self._path(run, name, MANIFEST)))
            for file in read_manifest(part)["files"]:  # `read_manifest` refuses paths outside the folder
                (part / file).parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(self._path(run, name, file), str(part / file))
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)

    def _path(self, run: str, *names: str) -> str:
        return "/".join((self._root + run, *names))

    def _list(self, place: str) -> list[str]:
        try:
            return list(self._fs.ls(place, detail=False))
        except FileNotFoundError:
            return []

    def _steps(self, run: str) -> list[str]:
        names = [path.rstrip("/").rpartition("/")[2] for path in self._list(self._path(run))]
        return sorted(n for n in names if _STEP.fullmatch(n) or self._fs.exists(self._path(run, n, MANIFEST)))

    def _whole(self, run: str) -> list[str]:
        return [name for name in self._steps(run) if self._fs.exists(self._path(run, name, MANIFEST))]

    def _created(self, run: str, name: str) -> float:
        try:
            created = float(json.loads(self._fs.cat_file(self._path(run, name, MANIFEST)))["created"])
        except (ValueError, KeyError, TypeError):  # the manifest is damaged
            return self._fs.modified(self._path(run, name, MANIFEST)).timestamp()
        note(created)
        return created


def mirror(
    remote: RemoteRuns,
    run: str,
    folder: Path,
    group: dist.ProcessGroup | None = None,
    share: Share | None = None,
) -> None:
    """Upload a local checkpoint; each rank uploads a share of its files. Collective.

    Objects of the same name in the store are replaced.

    Args:
        remote: the store.
        run: suffix of the run.
        folder: the local checkpoint.
        group: the ranks that agree, over their CPUs. None: the default group.
        share: the files that this rank uploads. None: all ranks see a complete checkpoint, and share its files evenly.

    Raises:
        CheckpointError: the store failed. An incomplete upload is not a checkpoint.
    """
    first = rank() == 0
    on_all_ranks(lambda: remote.withdraw(run, folder.name) if first else None, remote, group)
    on_all_ranks(lambda: remote.upload(share or _even_share(folder), run, folder.name), remote, group)
    on_all_ranks(lambda: remote.commit(folder, run) if first else None, remote, group)


def _even_share(folder: Path) -> Share:
    files = read_manifest(folder)["files"]
    return Share(folder, {name: files[name] for name in sorted(files)[rank() :: world_size()]})


def fetch(url: str, folder: Path) -> Path:
    """Download the checkpoint at `url` into a subfolder of `folder`, and return the subfolder.

    Raises:
        ValueError: there is no complete checkpoint at `url`.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    try:
        RemoteRuns(parent).download("", name, folder / name)
    except FileNotFoundError as error:
        raise ValueError(f"{url} is not a complete checkpoint: it has no {MANIFEST}. Check the URL.") from error
    return folder / name


def download_last(
    remote: RemoteRuns, base: Path, local: Path | None, whole: bool, only: str | None = None
) -> Path | None:
    """Download the newest checkpoint of a store, and return its folder.

    Args:
        remote: the store.
        base: local folder of the first run.
        local: the newest local checkpoint. It is returned instead if it is newer.
        whole: skip damaged checkpoints; see `runs.find_last`.
        only: suffix of the run to look at. None: all.

    Returns:
        The folder of the newest checkpoint; None if there is none.

    Raises:
        ValueError: without `whole`, the newest checkpoint is damaged.
    """
    for run, name in remote.newest():
        if only not in (None, run):
            continue
        folder = base.with_name(base.name + run) / name
        try:
            remote.download(run, name, folder)
            if whole:
                check_checkpoint(folder)
        except ValueError as error:
            if not whole:
                raise
            rank_zero_warn(f"Skipping a damaged checkpoint: {remote}{run}/{name}: {error}")
            continue
        return local if local is not None and created(local) > created(folder) else folder
    return local


def download_best(remote: RemoteRuns, base: Path) -> Path | None:
    """Download the checkpoint that `best` names in a store, and return its folder below `base`; None without `best`."""
    found = remote.target(BEST)
    if found is None:
        return None
    run, name = found
    remote.download(run, name, base.with_name(base.name + run) / name)
    return base.with_name(base.name + run) / name


def _same(folder: Path, manifest: Any) -> bool:
    try:
        check_checkpoint(folder)
        return bool(read_manifest(folder)["created"] == manifest["created"])
    except (ValueError, KeyError, TypeError):
        return False


def _number(run: str) -> int:
    return int(run.removeprefix("-v") or 0)
