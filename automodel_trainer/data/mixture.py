"""Mixtures: one training set from several sources, with a share of the tokens for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from automodel_trainer.data.batches import Document
from automodel_trainer.data.rows import Rows, RowStats, digest

KEYS = ("path", "weight", "epochs", "name")
MANY = 4  # epochs of a source within one of the mixture, from which on it is called out


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        path: what a data module takes as `train`.
        weight: its share of the tokens, relative to the other sources; None: as many as it has.
        epochs: how often it is seen in an epoch of the mixture, instead of a weight.
        name: its name in the ledger and in metrics.
    """

    path: Any
    weight: float | None
    epochs: float | None
    name: str


def sources_of(train: Any) -> list[Any]:
    """What each source of a mixture is read from, or what is no mixture itself."""
    sources = parse_sources(train)
    return [train] if sources is None else [source.path for source in sources]


def parse_sources(train: Any) -> list[Source] | None:
    """The sources of `[{path, weight, name}, …]`; None if `train` is no mixture.

    Raises:
        ValueError: an unknown key, a name twice, a weight that is not positive, or weights for some sources only.
    """
    if not isinstance(train, list) or not train or not all(isinstance(row, dict) and "path" in row for row in train):
        return None
    if any(
        isinstance(row["path"], str) and set(row) & {"messages", "conversations", "prompt", "text"} for row in train
    ):
        return None  # rows of data that have a column `path`
    sources: list[Source] = []
    for row in train:
        if unknown := sorted(set(row) - set(KEYS)):
            raise ValueError(f"train: a source of a mixture has no {unknown[0]!r}. Allowed: {', '.join(KEYS)}.")
        name = str(row.get("name") or _name_of(row["path"], len(sources)))
        for key in ("weight", "epochs"):
            _check_share(key, row.get(key), name)
        sources.append(Source(row["path"], row.get("weight"), row.get("epochs"), name))
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"train: two sources are called {twice[0]!r}. Give each a name of its own (name: …).")
    for key in ("weight", "epochs"):
        given = [getattr(source, key) is not None for source in sources]
        if any(given) and not all(given):
            raise ValueError(f"train: some sources have {key!r} and others have not. Give it to all or to none.")
    if sources[0].weight is not None and sources[0].epochs is not None:
        raise ValueError("train: sources have both 'weight' and 'epochs'. Give one of the two.")
    return sources


def _check_share(key: str, value: Any, name: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"train: {key}={value!r} of {name!r} is a {type(value).__name__} and must be a number.")
    if not 0 < value < float("inf"):
        raise ValueError(f"train: {key}={value} of {name!r} must be positive and finite. Or leave the source out.")


def check_temperature(temperature: float) -> float:
    """`temperature`, checked.

    Raises:
        ValueError: it is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive: 1 keeps the weights, more makes shares equal.")
    return temperature


def tempered(weights: np.ndarray, temperature: float) -> np.ndarray:
    """Shares from weights: weight ^ (1 / temperature), float64 `[sources]`, of sum 1."""
    shares = weights.astype(np.float64) ** (1 / temperature)
    return shares / shares.sum()  # type: ignore[no-any-return]


def _name_of(path: Any, number: int) -> str:
    return Path(str(path)).name.split(".")[0] if isinstance(path, str | Path) else f"source{number}"


class MixtureRows:
    """The rows of several sources as those of one. A row holds documents of one source.

    An epoch has as many tokens as all sources together, or what their `epochs` say. A source with more than its share
    is seen in part, and the next epoch goes on where this one ended in its order; one with less is seen again. So every
    row of a source is seen once before any is seen twice.

    Args:
        sources: the sources.
        rows: the rows of each.
        temperature: shares are weight ^ (1 / temperature): 1 keeps them, more makes them equal.
        seed: determines the order in which a source is gone through.

    Attributes:
        counts: rows of each source in an epoch.
    """

    def __init__(self, sources: Sequence[Source], rows: Sequence[Rows], temperature: float, seed: int) -> None:
        self.sources, self.rows, self.seed = list(sources), list(rows), seed
        self.width = max(part.width for part in rows)
        tokens = np.array([part.lengths.sum() for part in rows], dtype=np.float64)
        sizes = np.array([len(part) for part in rows])
        if sources[0].epochs is not None:
            repeats = np.array([source.epochs for source in sources], dtype=np.float64)
        else:
            weights = tokens if sources[0].weight is None else np.array([source.weight for source in sources])
            repeats = tempered(weights, temperature) * tokens.sum() / tokens
        self.counts = np.maximum(1, np.rint(repeats * sizes)).astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._order = lru_cache(maxsize=4 * len(sources))(self._permutation)
        names = [(source.name, part.fingerprint, int(n)) for source, part, n in zip(sources, rows, self.counts)]
        self.fingerprint = digest("mixture", names, seed)
        self.lengths = self.lengths_of(0)
        self.stats = self._stats()
        self.longest = max(part.longest for part in rows)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=4 * len(self.sources))(self._permutation)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shares(self) -> dict[str, tuple[float, float]]:
        """Of each source: its share of the tokens of an epoch, and how often it is seen in one."""
        seen = [len_ * part.lengths.mean() for len_, part in zip(self.counts, self.rows)]
        return {
            source.name: (float(tokens / sum(seen)), float(count / len(part)))
            for source, tokens, count, part in zip(self.sources, seen, self.counts, self.rows)
        }

    def _stats(self) -> RowStats:
        """Of an epoch; counts of samples and tokens are rounded."""
        parts = [(part.stats, count / len(part)) for part, count in zip(self.rows, self.counts)]
        keys = ("samples", "tokens", "supervised", "capacity")
        sums = {key: round(sum(getattr(stats, key) * repeat for stats, repeat in parts)) for key in keys}
        left = {key: sum(getattr(stats, key) for stats, _ in parts) for key in ("overlong", "unsupervised", "empty")}
        action = next((stats.overlong_action for stats, _ in parts if stats.overlong), "")
        unknown = sum(stats.unknown * stats.tokens * repeat for stats, repeat in parts) / max(1, sums["tokens"])
        return RowStats(rows=len(self), overlong_action=action, unknown=unknown, **sums, **left)

    def highest(self) -> tuple[int, int]:
        """The highest token id of all sources, and a sample that has it."""
        return max(part.highest() for part in self.rows)

    def describe_shares(self) -> list[str]:
        """A line for each source: its share, and what upsampling that means."""
        lines = []
        for (name, (share, epochs)), part, count in zip(self.shares.items(), self.rows, self.counts):
            how = f"{epochs:.3g} epochs in one of the mixture" + (", upsampled" if epochs > 1.005 else "")
            many = f" ⚠ each row {epochs:.1f} times" if epochs > MANY else ""
            lines.append(f"{name}: {share:.1%} of the tokens, {count:,} of {len(part):,} rows, {how}{many}")
        return lines

    def lengths_of(self, epoch: int) -> np.ndarray:
        """Tokens per row in an epoch, int64 `[len(self)]`."""
        return np.concatenate([part.lengths[self._rows_of(number, epoch)] for number, part in enumerate(self.rows)])

    def picture_tokens_of(self, epoch: int) -> np.ndarray | None:
        """Tokens of pictures per row in an epoch, int64 `[len(self)]`; None if no row can have one."""
        parts = [getattr(part, "picture_tokens", None) for part in self.rows]
        if all(part is None for part in parts):
            return None
        known = [np.zeros(len(rows), np.int64) if part is None else part for part, rows in zip(parts, self.rows)]
        return np.concatenate([part[self._rows_of(number, epoch)] for number, part in enumerate(known)])

    def kinds_of(self, epoch: int) -> dict[str, np.ndarray] | None:
        """Which rows have which kind of picture in an epoch: each bool `[len(self)]`; None if no row can have one."""
        parts = [getattr(part, "kinds", None) for part in self.rows]
        names = {name: None for part in parts if part is not None for name in part}
        found = {}
        for name in names:
            known = [np.zeros(len(rows), bool) if part is None else part[name] for part, rows in zip(parts, self.rows)]
            found[name] = np.concatenate([part[self._rows_of(number, epoch)] for number, part in enumerate(known)])
        return found or None

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        """The documents of rows, numbered on over epochs: `epoch · len(self) + row`; −1 is the filler."""
        found: list[list[Document]] = [[] for _ in rows]
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, number in enumerate(rows):
            if number >= 0:
                epoch, row = divmod(int(number), len(self))
                source = int(self.sources_of([row])[0])
                own = self._row(source, epoch * int(self.counts[source]) + row - int(self._starts[source]))
                wanted.setdefault(source, []).append((place, own))
        for source, pairs in wanted.items():
            for (place, _), documents in zip(pairs, self.rows[source].fetch([own for _, own in pairs])):
                found[place] = documents
        return found

    def sources_of(self, rows: Sequence[int]) -> np.ndarray:
        """The source of each row, numbered as in `fetch`: int64 `[len(rows)]`. The filler's is the first."""
        within = np.maximum(np.asarray(rows, dtype=np.int64), 0) % len(self)
        return np.searchsorted(self._starts, within, side="right") - 1

    def _rows_of(self, source: int, epoch: int) -> np.ndarray:
        count, size = int(self.counts[source]), len(self.rows[source])
        places = np.arange(epoch * count, (epoch + 1) * count)
        return np.concatenate(
            [
                self._order(source, int(turn))[places[places // size == turn] % size]
                for turn in np.unique(places // size)
            ]
        )

    def _row(self, source: int, place: int) -> int:
        turn, index = divmod(place, len(self.rows[source]))
        return int(self._order(source, turn)[index])

    def _permutation(self, source: int, turn: int) -> np.ndarray:
        return np.random.default_rng([self.seed, source, turn]).permutation(len(self.rows[source]))


def named_splits(rows: Mapping[str, Any], split: str) -> dict[str, str]:
    """The sets of a split that have names of their own: maps each name to its key in `rows`."""
    prefix = f"{split}/"
    return {key.removeprefix(prefix): key for key in rows if key.startswith(prefix)}
