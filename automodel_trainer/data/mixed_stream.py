"""A mixture of streams: rows of several `TokenStream`s, each with its share of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from automodel_trainer.data.mixture import Source, tempered
from automodel_trainer.data.rows import digest
from automodel_trainer.data.stream import Position, StreamRow, TokenStream


class MixedStream:
    """The rows of several streams as those of one. A row holds documents of one source, and all rows are full.

    The next row comes from the source that lags furthest behind its share. So after any number of rows each source has
    its share to within a row or two, on every layout and after every resume.

    Args:
        sources: the sources, each with a weight.
        streams: the stream of each, all of the same `seq_len`.
        temperature: shares are weight ^ (1 / temperature): 1 keeps them, more makes them equal.

    Attributes:
        names: of the sources.
        files: of all sources, in order.
        shares: of each source, of the tokens, float64 `[sources]`.

    Raises:
        ValueError: a source has no weight.
    """

    def __init__(self, sources: Sequence[Source], streams: Sequence[TokenStream], temperature: float) -> None:
        self.names = tuple(source.name for source in sources)
        self.streams, self.seq_len, self.tokenizer = list(streams), streams[0].seq_len, streams[0].tokenizer
        self.files = [file for stream in streams for file in stream.files]
        self.shares = tempered(np.array(weights_of(sources)), temperature)
        parts = [(name, float(share), s.fingerprint) for name, share, s in zip(self.names, self.shares, streams)]
        self.fingerprint = digest("mixed stream", parts)

    def beginning(self) -> Position:
        """The position of the first row: rows taken of each source, and the position in each."""
        return {"rows": [0] * len(self.streams), "sources": [stream.beginning() for stream in self.streams]}

    def rows(self, position: Position) -> Iterator[StreamRow]:
        """Yield the rows from a position on, each with the position after it and the number of its source.

        Raises:
            ValueError: a stream has no text.
        """
        taken, places = np.array(position["rows"]), list(position["sources"])
        streams = [stream.rows(place) for stream, place in zip(self.streams, places)]
        while True:
            number = int(np.argmax(self.shares * (taken.sum() + 1) - taken))
            documents, places[number], _ = next(streams[number])
            taken[number] += 1
            yield documents, {"rows": taken.tolist(), "sources": list(places)}, number

    def news(self, before: Position, after: Position) -> list[str]:
        """What a user is told between two positions; see `TokenStream.news`."""
        parts = zip(self.names, self.streams, before["sources"], after["sources"])
        return [f"{name}: {line}" for name, stream, one, other in parts for line in stream.news(one, other)]

    def describe_shares(self) -> list[str]:
        """A line for each source: its share of the tokens."""
        return [f"{name}: {share:.1%} of the tokens, streamed" for name, share in zip(self.names, self.shares)]


def weights_of(sources: Sequence[Source]) -> list[float]:
    """The weights of streamed sources.

    Raises:
        ValueError: a source has none.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if len(weights) < len(sources):
        raise ValueError(
            f"train: {sources[0].name!r} is streamed, so nobody knows how many tokens it has. Give each source a "
            "'weight', its share of the tokens, in place of 'epochs' or nothing; or set streaming=False."
        )
    return weights
