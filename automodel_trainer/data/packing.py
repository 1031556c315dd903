"""Packing (which samples share a row) and the order of the rows in an epoch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

GROUPED_BATCHES = 32
"""Length grouping sorts this many global batches at a time. The rows of a batch have similar lengths, and the order of
the batches is still random."""

SEARCH_BUDGET = 500
"""Samples to try for a row beyond its first filling, before the best filling found is taken."""


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack samples into rows by minimum bin slack. The result is deterministic.

    The longest sample that is left opens a row. A short search then finds the samples that fill the rest best. The
    first attempt of the search is first-fit. If rows hold few samples, searching on leaves half as much space empty.

    Args:
        lengths: tokens per sample `[n]`, each from 1 to `capacity`.
        capacity: tokens per row.

    Returns:
        The indices of the samples in each row.

    Raises:
        ValueError: a sample is empty or does not fit into a row.

    Source: Gupta & Ho, "A new heuristic algorithm for the one-dimensional bin-packing problem", 1999.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    for sample in np.flatnonzero((lengths < 1) | (lengths > capacity))[:1]:
        raise ValueError(
            f"sample {sample} has {lengths[sample]} tokens, and a row has {capacity}. Truncate or split longer "
            "samples, leave out empty ones, or give a larger capacity."
        )
    samples: dict[int, list[int]] = {}  # samples of one length are interchangeable: search over lengths
    for sample in np.argsort(-lengths, kind="stable").tolist():
        samples.setdefault(int(lengths[sample]), []).append(sample)
    sizes = sorted(samples)
    counts = {size: len(of_size) for size, of_size in samples.items()}
    rows: list[list[int]] = []
    while sizes:
        longest = sizes[-1]
        counts[longest] -= 1
        filling = [longest, *_fill(sizes, counts, capacity - longest)]
        rows.append([samples[size].pop() for size in filling])
        counts.update((size, len(samples[size])) for size in filling)
        for size in {size for size in filling if not samples[size]}:
            sizes.remove(size)
    return rows


def _fill(sizes: list[int], counts: dict[int, int], room: int) -> list[int]:
    """The sizes that fill `room` best, as far as the search finds them.

    The search is depth-first, large sizes before small ones. It ends when no room is left or the budget is spent.

    Args:
        sizes: sizes of samples in ascending order.
        counts: number of samples of each size.
        room: tokens to fill.
    """
    best: list[int] = []
    least, budget = room, SEARCH_BUDGET
    taken: list[int] = []  # indices into `sizes`, non-increasing
    below = len(sizes)  # only sizes with an index below this one are tried next
    backtracked = False  # the first filling does not cost any budget
    while least and budget:
        index = min(bisect_right(sizes, room), below) - 1
        while index >= 0 and not counts[sizes[index]]:
            index -= 1
        if index >= 0:
            budget -= backtracked
            taken.append(index)
            counts[sizes[index]] -= 1
            room -= sizes[index]
            below = index + 1
            if room < least:
                best, least = [sizes[i] for i in taken], room
        elif taken:  # nothing more fits: put the last one back and try smaller ones
            backtracked = True
            below = taken.pop()
            counts[sizes[below]] += 1
            room += sizes[below]
        else:
            break
    for index in taken:
        counts[sizes[index]] += 1
    return best


def epoch_order(
    lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int, shuffle: bool = True, grouped: bool = False
) -> np.ndarray:
    """The order of the rows in an epoch. It depends only on the arguments, not on the number of ranks.

    Args:
        lengths: tokens per row `[n]`.
        batch_size: rows per global batch.
        seed: determines the permutation, with `epoch`.
        epoch: number of the epoch, from 0.
        shuffle: False keeps the order of the data set.
        grouped: put rows of similar length into the same global batch, to reduce padding.

    Returns:
        Row numbers, int64 `[n]`.
    """
    count = len(lengths)
    if not shuffle:
        return np.arange(count)
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(count)
    if not grouped:
        return order
    window = batch_size * GROUPED_BATCHES
    windows = [order[start : start + window] for start in range(0, count, window)]
    order = np.concatenate([rows[np.argsort(-lengths[rows], kind="stable")] for rows in windows])
    # Shuffle the batches, which are sorted by length now. An incomplete batch stays last.
    full = count - count % batch_size
    batches = generator.permutation(order[:full].reshape(-1, batch_size))
    return np.concatenate([batches.reshape(-1), order[full:]])
