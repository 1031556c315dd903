"""Keep what attention computes while the rest of a block is computed again.

On long rows attention takes most of a block's time, and its result is as small as the block's input. torch's selective
checkpointing cannot be used for it: that looks at every operation, and compiled code does not run under it. Here only
the call of attention is looked at, which compiled code leaves for it.

Source: rematerialization-aware checkpointing of DistFlashAttn, arXiv 2310.03294.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from automodel_trainer.nn._torch import ATTENTION, DispatchMode, pytree


class Store(Protocol):
    """Keeps tensors from a block's forward to its backward."""

    def keep(self, tensor: Tensor) -> Any:
        """What stands for the tensor until then; None: there is no room for it."""

    def kept(self, entry: Any) -> Tensor:
        """The tensor."""


class _Here(threading.local):
    run: _Run | None = None  # of the block that this thread computes


_here = _Here()
_wanted = False  # compiled code looks at this: a flag of its own is a cheap guard


def keep_results() -> None:
    """Let attention be looked at from now on, in this process. Code that is compiled later leaves it."""
    global _wanted
    _wanted = True


def results_are_kept() -> bool:
    """Whether `keep_results` was called."""
    return _wanted


@torch.compiler.disable
def with_kept_results(attend: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `attend`. Its results are kept in the forward of a block in `contexts`, and taken from there when it is
    computed again."""
    if _here.run is None:
        return attend(*args, **kwargs)
    with _here.run:
        return attend(*args, **kwargs)


def contexts(store: Store) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a block's forward and of its recomputation, for torch's `checkpoint(context_fn=…)`."""
    entries: list[Any] = []
    return _computing(lambda: _Record(store, entries)), _computing(lambda: _Replay(store, entries))


@contextmanager
def _computing(make: Callable[[], _Run]) -> Iterator[None]:
    before, _here.run = _here.run, make()
    try:
        yield
    finally:
        _here.run = before


class _Run(DispatchMode):
    """One run of a block. Autograd stays above it: it saves the results for the backward of attention, as always."""

    def __init__(self, store: Store, entries: list[Any]) -> None:
        super().__init__()
        self.store, self.entries = store, entries

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTION:
            return func(*args, **(kwargs or {}))
        return self.result(lambda: func(*args, **(kwargs or {})))

    def result(self, compute: Callable[[], Any]) -> Any:
        raise NotImplementedError


class _Record(_Run):
    """The forward."""

    def result(self, compute: Callable[[], Any]) -> Any:
        found = compute()
        leaves, structure = pytree.tree_flatten(found)
        kept = [self.store.keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        missing = any(isinstance(leaf, Tensor) and entry is None for leaf, entry in zip(leaves, kept))
        self.entries.append(None if missing else (kept, structure, [isinstance(leaf, Tensor) for leaf in leaves]))
        return found


class _Replay(_Run):
    """The recomputation, which calls attention as often and in the same order."""

    def __init__(self, store: Store, entries: list[Any]) -> None:
        super().__init__(store, entries)
        self.place = 0

    def result(self, compute: Callable[[], Any]) -> Any:
        entry = self.entries[self.place]
        self.place += 1
        if entry is None:
            return compute()
        kept, structure, tensors = entry
        leaves = [self.store.kept(leaf) if tensor else leaf for leaf, tensor in zip(kept, tensors)]
        return pytree.tree_unflatten(leaves, structure)
