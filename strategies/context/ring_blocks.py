"""Which queries of one shard look at which keys of another's, without a mask where that can be said without.

A shard is two chunks of the sequence, r and 2n−1−r. Documents of packed rows are runs of tokens, so of two different
chunks at most one document lies in both: what its later part sees of its earlier one is a rectangle. Within a chunk
every document is causal by itself.
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
    """What `rank` computes with the keys of `origin`.

    Args:
        length: tokens of a shard.
        mask: see `ring_attention`.
        causal: without a mask, whether a token sees those before it, or all.
        starts: of a causal row's documents, ascending from 0, for every row; None: a row is one document.
    """
    half = length // 2
    if mask is not None:
        yield Block(ALL, ALL, mask[..., origin * length : (origin + 1) * length])
    elif starts is not None:
        mine, theirs = ([(r, 0), (2 * ranks - 1 - r, half)] for r in (rank, origin))
        for row, begin in enumerate(starts):
            for chunk, at in mine:
                for other, place in theirs:
                    for queries, keys, same in _visible(begin, chunk * half, other * half, half):
                        yield Block(_moved(queries, at), _moved(keys, place), None, same, slice(row, row + 1))
    elif not causal or origin == rank:  # within a shard the order is that of the sequence
        yield Block(ALL, ALL, None, causal)
    elif origin < rank:  # its early chunk lies before both of ours, its late chunk behind both
        yield Block(ALL, slice(None, half), None)
    else:  # both of its chunks lie between our two
        yield Block(slice(half, None), ALL, None)


def _visible(starts: list[int], query: int, key: int, width: int) -> Iterator[tuple[slice, slice, bool]]:
    """Of chunks of `width` tokens that begin at `query` and `key`: ranges of queries and keys, and whether they are the
    same tokens, seen causally."""
    first, last = bisect_right(starts, key), bisect_right(starts, key + width - 1)
    if key == query:
        bounds = [0, *(start - key for start in starts[first:last]), width]
        yield from ((slice(a, b), slice(a, b), True) for a, b in pairwise(bounds))
    elif key < query:  # the document of the last key, if it goes on to the first query
        begin = max(starts[last - 1] - key, 0)
        end = (starts[last] if last < len(starts) else query + width) - query
        if end > 0:
            yield slice(0, min(end, width)), slice(begin, width), False


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
