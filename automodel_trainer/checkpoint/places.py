"""Which ranks see the same disk. Nodes without a shared folder write their parts of a checkpoint for object storage."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from automodel_trainer.checkpoint.manifest import MANIFEST
from automodel_trainer.checkpoint.record import Entry
from automodel_trainer.distributed.agreement import gather, on_all_ranks, rank


@dataclass(frozen=True)
class Place:
    """The disk that this rank writes to, and the ranks that do so, too.

    Attributes:
        ranks: they, in order. The first one makes folders.
        apart: whether there is another place. Rank 0's is then not whole either.
    """

    ranks: tuple[int, ...]
    apart: bool = False

    @property
    def first(self) -> bool:
        """Whether this rank makes the folders of its place."""
        return rank() == self.ranks[0]


@dataclass(frozen=True)
class Share:
    """The files that one rank uploads.

    Attributes:
        source: where they lie.
        files: maps paths in `source` to entries.
    """

    source: Path
    files: Mapping[str, Entry]


def place_of(folder: Path, group: dist.ProcessGroup | None = None) -> Place:
    """The place of this rank. Collective.

    Ranks that do not see a file of rank 0 in `folder` are told apart by the names of their machines.

    Args:
        folder: an existing folder on rank 0's disk.
        group: the ranks that agree, over their CPUs. None: the default group.
    """
    token = folder / f".seen-by-{uuid.uuid4().hex}"
    first = rank() == 0
    on_all_ranks(lambda: token.touch() if first else None, folder, group)
    token = folder / gather(token.name, group)[0]
    mine = "" if _sees(token) else socket.gethostname()
    places = gather(mine, group)
    if first:
        token.unlink()
    return Place(tuple(other for other, place in enumerate(places) if place == mine), len(set(places)) > 1)


def _sees(file: Path) -> bool:
    try:
        return file.name in os.listdir(file.parent)  # a listing asks a file server; it may have been told "not there"
    except OSError:
        return False


def leave_manifest(folder: Path) -> None:
    """Remove everything of a checkpoint but its manifest: its files are in object storage, and not all were here."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MANIFEST:
            path.unlink()
