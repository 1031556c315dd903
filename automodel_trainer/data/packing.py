"""Which samples share a row, and in which order rows are trained on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

GROUPED_BATCHES = 32
"""Length grouping sorts this many global batches at a time: alike lengths, and an order that is still random."""


SEARCH_BUDGET = 500
"""Samples tried beyond the first filling of a row before the best one found is taken."""


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack samples into rows by minimum bin slack; the same result for the same lengths.

    Row by row: the longest sample that is left opens a row, and a short search finds those that fill the rest best.
    The first try of that search is first-fit; where rows hold few samples, going on leaves half as much empty.

    Args:
        lengths: tokens of each sample, each from 1 to `capacity`.
        capacity: tokens in a row.

    Returns:
        For each row the indices of its samples.

    Source: Gupta & Ho, "A new heuristic algorithm for the one-dimensional bin-packing problem", 1999.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= capacity), "a sample does not fit into a row"
    samples: dict[int, list[int]] = {}
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
    """Sizes that fill `room` as far as the search finds, each at most as often as `counts` says.

    Depth first, large before small, until nothing is left empty or the budget is spent. `sizes` are in order.
    """
    best: list[int] = []
    least, budget = room, SEARCH_BUDGET
    taken: list[int] = []  # indices into `sizes`, not rising
    below = len(sizes)
    backtracked = False  # the first filling is free, however many samples it takes
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
        elif taken:  # nothing more fits: put the last one back and go on with smaller ones
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
    """The order in which an epoch goes through the rows, from (seed, epoch) and the global batch size alone.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a global batch.
        seed: together with `epoch` it decides the permutation.
        epoch: counted from 0.
        shuffle: False for the order of the data set.
        grouped: put rows of like length into the same global batch, so that padding is short.
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
    # Batches of like length must not follow each other by length; a short last batch stays the last.
    full = count - count % batch_size
    batches = generator.permutation(order[:full].reshape(-1, batch_size))
    return np.concatenate([batches.reshape(-1), order[full:]])
