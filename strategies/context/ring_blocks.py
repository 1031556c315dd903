"""Which queries of one shard attend to which keys of another, as blocks that need no mask where possible.

A shard is two chunks of the sequence, r and 2n−1−r. The documents of a packed row are runs of tokens, so at most one
document lies in both of two given chunks. Its part in the later chunk sees all of its part in the earlier one: a
rectangle of scores. Within a chunk every document is causal by itself: a triangle.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from automodel_trainer.strategies.context.block_attention import Block

ALL = slice(None)


def blocks_of(
    length: int,
    rank: int,
    origin: int,
    ranks: int,
    mask: Tensor | None,
    causal: bool,
    starts: list[list[int]] | None = None,
) -> Iterator[Block]:
    """The blocks that `rank` computes with the keys of rank `origin`.

    Args:
        length: number of tokens of a shard.
        rank: the rank that holds the queries.
        origin: the rank that holds the keys.
        ranks: number of ranks.
        mask: bool `[b, 1, length, ranks · length]`, see `ring_attention`.
        causal: without a mask, a token attends to itself and earlier tokens; otherwise to all.
        starts: for every causal row, the start indices of its documents, ascending from 0; None: a row is one document.
    """
    half = length // 2
    if mask is not None:
        yield Block(ALL, ALL, mask[..., origin * length : (origin + 1) * length])
    elif starts is not None:
        # the two chunks of each rank: index in the sequence, and offset in the shard
        mine, theirs = ([(r, 0), (2 * ranks - 1 - r, half)] for r in (rank, origin))
        for row, begin in enumerate(starts):
            for chunk, at in mine:
                for other, place in theirs:
                    for queries, keys, same in _visible(begin, chunk * half, other * half, half):
                        yield Block(_moved(queries, at), _moved(keys, place), None, same, slice(row, row + 1))
    elif not causal or origin == rank:  # within a shard, tokens are in sequence order
        yield Block(ALL, ALL, None, causal)
    elif origin < rank:  # origin's early chunk lies before both of ours, its late chunk after both
        yield Block(ALL, slice(None, half), None)
    else:  # both of origin's chunks lie between our two
        yield Block(slice(half, None), ALL, None)


def _visible(starts: list[int], query: int, key: int, width: int) -> Iterator[tuple[slice, slice, bool]]:
    """The visible parts of a chunk of keys for a chunk of queries, in one row.

    Args:
        starts: the start indices of the row's documents.
        query, key: start indices of the two chunks.
        width: number of tokens of a chunk.

    Yields:
        a range of queries, a range of keys, and whether they are the same tokens, which attend causally.
    """
    first, last = bisect_right(starts, key), bisect_right(starts, key + width - 1)
    if key == query:
        bounds = [0, *(start - key for start in starts[first:last]), width]
        yield from ((slice(a, b), slice(a, b), True) for a, b in pairwise(bounds))
    elif key < query:  # only the document of the last key can continue into the chunk of queries
        begin = max(starts[last - 1] - key, 0)
        end = (starts[last] if last < len(starts) else query + width) - query
        if end > 0:
            yield slice(0, min(end, width)), slice(begin, width), False


def _moved(part: slice, by: int) -> slice:
    """A range of a chunk as a range of the shard, where the chunk starts at `by`."""
    return slice(part.start + by, part.stop + by)
