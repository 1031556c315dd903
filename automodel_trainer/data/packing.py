"""Which samples share a row, and in which order rows are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GROUPED_BATCHES = 32
"""Length grouping sorts this many global batches at a time: alike lengths, and an order that is still random."""


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack samples into rows: first-fit decreasing, O(n log n), the same result for the same lengths.

    The longest samples are placed first, each into the first row that still has room for it. A binary tree over the
    rows, holding the largest room of each half, finds that row in O(log n).

    Args:
        lengths: tokens of each sample, each from 1 to `capacity`.
        capacity: tokens in a row.

    Returns:
        For each row the indices of its samples.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= capacity), "a sample does not fit into a row"
    order = np.argsort(-lengths, kind="stable")
    leaves = 1 << max(1, len(lengths) - 1).bit_length()  # at worst every sample has a row of its own
    room = [capacity] * (2 * leaves)
    rows: list[list[int]] = []
    for sample, length in zip(order.tolist(), lengths[order].tolist()):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(sample)
        room[node] -= length
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
    return rows


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
