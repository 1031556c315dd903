"""The place of a user's own DataLoader in its epoch: a resumed run goes on with the next batch."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from automodel_trainer.checkpoint.rng import rng_state, set_rng_state
from automodel_trainer.data.adapt import Steps

KEPT = 64  # batches whose digest is kept beyond those that workers build ahead
Loader = DataLoader | Steps


class Order:
    """Hands out what a loader's sampler hands out, and can begin in the middle of it.

    Samplers draw random numbers when an iteration begins. Their generators' states of that moment are kept. To begin in
    the middle, the sampler is asked again under these states, and the batches that were trained are skipped without
    reading them. A digest of the skipped ones shows whether they are the same.

    Args:
        sampler: a loader's batch sampler, or its sampler if it makes no batches.
        generators: the generators that the sampler draws from, besides the global ones.
        kept: for how many batches a digest is kept.
    """

    def __init__(self, sampler: Any, generators: list[torch.Generator], kept: int) -> None:
        self.sampler_itself, self.generators = sampler, generators
        self.begun: list[dict[str, Any]] = []  # the generators when the iteration began, and at its first batch
        self.digests: deque[tuple[int, int]] = deque(maxlen=kept)  # of the first n batches, for the newest n
        self._resumed: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "sampler_itself":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.sampler_itself, name)

    def __len__(self) -> int:
        return len(self.sampler_itself)

    def __iter__(self) -> Iterator[Any]:
        # torch's loader with workers asks twice for an iterator and uses the second.
        resumed = self._resumed
        if resumed is None:
            self.begun = [self._states()]
            return self._first(iter(self.sampler_itself))
        now = self._states()
        self._set(resumed["begun"][0])
        batches = iter(self.sampler_itself)
        self._set(now)
        return self._rest(batches, resumed)

    def resume(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin after the batches that `Place.state_dict` counted."""
        self._resumed = state

    def _first(self, batches: Iterator[Any]) -> Iterator[Any]:
        self.begun.append(self._states())
        yield from self._noted(batches, 0, 0)

    def _rest(self, batches: Iterator[Any], resumed: dict[str, Any]) -> Iterator[Any]:
        self._resumed, count, now = None, resumed["batches"], self._states()
        self._set(resumed["begun"][1])
        digest, skipped = 0, 0
        for batch in islice(batches, count):
            digest, skipped = _digest(batch, digest), skipped + 1
        set_rng_state(now["global"])  # the sampler's own generators stay where its order left them
        self.begun = resumed["begun"]
        if skipped == count and resumed["digest"] in (digest, None):
            yield from self._noted(batches, count, digest)
            return
        self._set(now)
        rank_zero_warn(begins_anew(count, "its rows come in another order than then, or are others"))
        yield from iter(self)

    def _noted(self, batches: Iterator[Any], taken: int, digest: int) -> Iterator[Any]:
        self.digests.clear()
        for number, batch in enumerate(batches, start=taken + 1):
            digest = _digest(batch, digest)
            self.digests.append((number, digest))
            yield batch

    def _states(self) -> dict[str, Any]:
        state = rng_state()
        state.pop("cuda", None)
        return {"global": state, "own": [generator.get_state() for generator in self.generators]}

    def _set(self, state: dict[str, Any]) -> None:
        set_rng_state(state["global"])
        for generator, own in zip(self.generators, state["own"]):
            generator.set_state(own)


class Place:
    """Gives a loader `state_dict` and `load_state_dict`, which Lightning saves and restores.

    Args:
        loader: a loader over rows that can be asked for by number.
        batches: how many batches of the epoch the run has taken.
        share: this rank's index among the ranks that see different rows, and their number.
    """

    def __init__(self, loader: Loader, batches: Callable[[], int], share: tuple[int, int]) -> None:
        self.loader, self.share, self._batches = loader, share, batches
        makes_batches = getattr(loader, "batch_sampler", None) is not None
        self._name = "numbers" if isinstance(loader, Steps) else "batch_sampler" if makes_batches else "sampler"
        sampler = getattr(loader, self._name)
        owners = (loader, getattr(loader, "sampler", None), sampler)
        found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None}
        workers = getattr(loader, "num_workers", 0) * (getattr(loader, "prefetch_factor", None) or 0)
        self.order = Order(sampler, list(found.values()), KEPT + workers)
        # torch lets nobody replace the sampler of a loader that exists; it reads the attribute when it iterates.
        loader.__dict__[self._name] = self.order
        loader.state_dict, loader.load_state_dict = self.state_dict, self.load_state_dict  # type: ignore[union-attr]

    def forget(self) -> None:
        """Leave the loader as it was given."""
        self.loader.__dict__[self._name] = self.order.sampler_itself
        for name in ("state_dict", "load_state_dict"):
            self.loader.__dict__.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """The place as plain values and small tensors."""
        batches = self._batches()
        digest = dict(self.order.digests).get(batches)
        known = batches > 0 and digest is not None and len(self.order.begun) == 2
        return {
            "batches": batches,
            "begun": self.order.begun if known else None,
            "digest": digest,
            "own": [generator.get_state() for generator in self.order.generators],
            "share": list(self.share),
            "rows": self._rows,
            "length": len(self.loader),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batches that were taken; where that cannot be exact, say so and begin the epoch anew."""
        batches = state.get("batches", 0)
        if not batches:
            for generator, own in zip(self.order.generators, state.get("own", [])):
                generator.set_state(own)
            return
        same_share = state["share"] == list(self.share)
        # torch's own sampler cuts one order, which depends on its seed and the epoch alone, into the ranks' shares.
        cut = type(getattr(self.loader, "sampler", None)) is DistributedSampler and self._rows is not None
        shared = cut or isinstance(self.loader, Steps)
        if state["begun"] is None:
            rank_zero_warn(begins_anew(batches, "the checkpoint does not hold its order"))
        elif (state["rows"], state["length"]) != (self._rows, len(self.loader)):
            rank_zero_warn(begins_anew(batches, "its length or the rows of a batch are others than then"))
        elif not same_share and not shared:
            rank_zero_warn(begins_anew(batches, "its order is that of another number of ranks"))
        else:
            self.order.resume({**state, "digest": state["digest"] if same_share else None})

    @property
    def _rows(self) -> int | None:
        """Rows of a batch on all ranks together; None: unknown."""
        size = getattr(self.loader, "batch_size", None)
        return size * self.share[1] if isinstance(size, int) else None


def can_remember(loader: Any) -> bool:
    """Whether `Place` can be given to a loader: its rows have numbers, and it does not keep its place itself."""
    if hasattr(loader, "load_state_dict"):
        return False
    return isinstance(loader, Steps) or (
        isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    )


def why_forgotten(loaders: Any, saved: bool) -> str | None:
    """Why a run that goes on in the middle of an epoch begins it anew; None if its loaders know their places.

    Args:
        loaders: the training loader, or a collection of several.
        saved: whether the checkpoint holds the places of loaders.
    """
    each = CombinedLoader(loaders, "max_size_cycle").flattened
    unable = [loader for loader in each if not hasattr(loader, "load_state_dict")]
    if unable:
        streams = isinstance(unable[0], DataLoader)
        kind = "DataLoader over an IterableDataset" if streams else type(unable[0]).__name__
        return f"a {kind} does not know its place"
    if len(each) > 1 and any(_is_ours(loader) for loader in each):
        return f"there are {len(each)} loaders, which may be at different places"
    return None if saved else "the checkpoint does not hold its place"


def _is_ours(loader: Any) -> bool:
    return isinstance(getattr(loader.load_state_dict, "__self__", None), Place)


def begins_anew(batches: int, reason: str) -> str:
    """What to tell a user whose loader cannot go on where it was."""
    return (
        f"The checkpoint is in the middle of an epoch, and the training loader cannot go on where it was: {reason}. It "
        "begins the epoch anew with its first batch and ends it after as many batches as were left. So the rows "
        f"of {batches} batches are trained twice or not at all. Go on from a checkpoint of the end of an epoch "
        "(DCPCheckpoint(every_n_epochs=1)), or give the loader a state_dict() and load_state_dict(), as torchdata's "
        "StatefulDataLoader has them."
    )


def _digest(batch: Any, before: int) -> int:
    return zlib.crc32(repr(batch).encode(), before)
