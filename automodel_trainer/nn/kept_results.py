"""Keep what attention computes while the rest of a block is computed again.

On long rows attention takes most of a block's time, and its result is as small as the block's input. torch's selective
checkpointing cannot keep it in blocks that are cut into several graphs: it looks at every operation of a block, and
nothing is compiled under it. Here only the call of attention is looked at, which compiled code leaves for it.

Source: rematerialization-aware checkpointing in DistFlashAttn, arXiv 2310.03294.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from automodel_trainer.nn._torch import ATTENTION, DispatchMode, pytree

__all__ = ["Store", "contexts", "results_are_kept", "with_kept_results"]


class Store(Protocol):
    """Keeps tensors from a block's forward to its backward."""

    def keep(self, tensor: Tensor) -> Any:
        """What stands for the tensor until `kept` gets it; None: there is no room for it."""

    def kept(self, entry: Any) -> Tensor:
        """The tensor that an entry stands for."""


# Of the block that runs now. It is not kept by thread: autograd computes blocks again in a thread of its own while the
# one that called it waits. Compiled code reads the flag, which makes a cheap guard.
_run: _Run | None = None
_runs = False


def results_are_kept() -> bool:
    """Whether the block that runs now keeps its results of attention, or has kept them."""
    return _runs


@torch.compiler.disable
def with_kept_results(attend: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `attend`. In the forward of a block its results are kept; when the block runs again, they are found."""
    if _run is None:
        return attend(*args, **kwargs)
    with _run:
        return attend(*args, **kwargs)


def contexts(store: Store) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a block's forward and of its recomputation, for torch's `checkpoint(context_fn=…)`."""
    kept: list[_Result | None] = []
    return _Running(lambda: _Forward(store, kept)), _Running(lambda: _Again(store, kept))


class _Running(AbstractContextManager[None]):
    """A context in which a block runs. A graph with two backwards enters it twice."""

    def __init__(self, make: Callable[[], _Run]) -> None:
        self._make = make

    def __enter__(self) -> None:
        global _run, _runs
        self._before, _run, _runs = _run, self._make(), True

    def __exit__(self, *_: object) -> None:
        global _run, _runs
        _run, _runs = self._before, self._before is not None


class _Result:
    """What an operation gave back: tensors, numbers, and None."""

    def __init__(self, leaves: list[tuple[bool, Any]], structure: Any) -> None:
        self.leaves, self.structure = leaves, structure  # (whether it was a tensor, what stands for it)


class _Run(DispatchMode):
    """One run of a block. It sits below autograd, which records attention and what its backward reads as always."""

    def __init__(self, store: Store, kept: list[_Result | None]) -> None:
        super().__init__()
        self.store, self.kept = store, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def compute() -> Any:
            return func(*args, **(kwargs or {}))

        return self.result(compute) if func in ATTENTION else compute()

    def result(self, compute: Callable[[], Any]) -> Any:
        """What an operation of attention gives back."""
        raise NotImplementedError


class _Forward(_Run):
    """Keeps results."""

    def result(self, compute: Callable[[], Any]) -> Any:
        found = compute()
        leaves, structure = pytree.tree_flatten(found)
        entries = [(isinstance(leaf, Tensor), leaf) for leaf in leaves]
        entries = [(tensor, self.store.keep(leaf) if tensor else leaf) for tensor, leaf in entries]
        missing = any(tensor and entry is None for tensor, entry in entries)
        self.kept.append(None if missing else _Result(entries, structure))
        return found


class _Again(_Run):
    """Finds the results: the block calls attention in the same order."""

    def __init__(self, store: Store, kept: list[_Result | None]) -> None:
        super().__init__(store, kept)
        self._next = iter(kept)

    def result(self, compute: Callable[[], Any]) -> Any:
        result = next(self._next)
        if result is None:
            return compute()
        leaves = [self.store.kept(entry) if tensor else entry for tensor, entry in result.leaves]
        return pytree.tree_unflatten(leaves, result.structure)
