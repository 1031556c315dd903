"""Let all ranks fail together: an error on one rank is raised on every rank, so none waits for one that gave up."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from zlib import crc32

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


class CheckpointError(OSError):
    """A checkpoint file could not be read or written. Raised on all ranks. Earlier checkpoints are not touched."""


def on_all_ranks(action: Callable[[], T], folder: Any, group: dist.ProcessGroup | None = None) -> T:
    """Call `action` on every rank and wait for all ranks. If it fails on any, raise the same error on every rank.

    Args:
        action: the function to call.
        folder: the checkpoint folder, for the error message.
        group: the ranks that agree, over their CPUs. None: all ranks, over the default group.

    Returns:
        The result of `action` on this rank.

    Raises:
        ValueError: a rank raised a ValueError (bad input; trying again does not help).
        CheckpointError: a rank raised an OSError.
    """
    result, error = None, None
    try:
        result = action()
    except (OSError, ValueError) as raised:
        error = raised
    except CheckpointException as raised:  # DCP has agreed already: it raises this BaseException on all ranks
        raise CheckpointError(_errno_of(raised), f"{folder}: {_first_failure(raised)}") from raised
    failures = gather(None if error is None else _describe(error), group)
    first = next(((rank, failure) for rank, failure in enumerate(failures) if failure is not None), None)
    if first is not None:
        rank, (kind, number, message) = first
        where = f" (on rank {rank})" if len(failures) > 1 else ""
        if kind == "ValueError":
            raise ValueError(message + where) from error
        raise CheckpointError(number, f"{folder}: {message}{where}") from error
    return result  # type: ignore[return-value]


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` of every rank, in rank order. Collective; values are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def own_share(pieces: Iterable[str]) -> set[str]:
    """The names of those of this rank's `pieces` that it must write. Collective.

    Several ranks may hold the same piece. Each piece is assigned to exactly one of its holders.
    """
    mine = list(pieces)
    holders: dict[str, list[int]] = {}
    for number, held in enumerate(gather(mine)):
        for piece in held:
            holders.setdefault(piece, []).append(number)
    # A hash of the name spreads the pieces over their holders. `hash()` would differ between processes.
    return {piece for piece in mine if holders[piece][crc32(piece.encode()) % len(holders[piece])] == rank()}


def _describe(error: Exception) -> tuple[str, int, str]:
    if isinstance(error, ValueError):
        return "ValueError", 0, str(error)
    return "OSError", getattr(error, "errno", None) or errno.EIO, str(error)


def _errno_of(exception: CheckpointException) -> int:
    errors = [failure[0] for failure in exception.failures.values()]
    return next((e.errno for e in errors if isinstance(e, OSError) and e.errno), errno.EIO)


def _first_failure(exception: CheckpointException) -> str:
    number, (error, _) = sorted(exception.failures.items())[0]
    return f"{type(error).__name__}: {error} (on rank {number})"
