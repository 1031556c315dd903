"""Compute the inputs of blocks again that were not kept: run the block before once more.

Blocks form a chain where each gets what the one before it gave. If only some inputs of a chain are held, backward runs
the blocks between two of them forward once more, and keeps their results until the blocks have had their backward.

Source: Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from automodel_trainer.nn._torch import pytree, version_of
from automodel_trainer.nn.float_tensors import float_tensors
from automodel_trainer.nn.random_states import RandomStates

LONGEST = 8  # blocks of which one input is held; each more keeps an input more on the device in backward

Place: TypeAlias = tuple[StorageWeakRef, int, torch.Size, tuple[int, ...], torch.dtype, int | None]


def place_of(tensor: Tensor) -> Place:
    """Where a tensor lies, in what shape, and how often it was written to. Two equal places hold the same numbers.

    A place does not keep the tensor. As long as it exists, no other storage is equal to this one.
    """
    storage = StorageWeakRef(tensor.untyped_storage())
    return storage, int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype, version_of(tensor)


def is_held(position: int, blocks: int, room: int) -> bool:
    """Whether to hold the input of the block at `position` of a chain, if there is room for so many inputs.

    Those that are held lie evenly in the chain. At least one of `LONGEST` is.
    """
    room = max(room, -(-blocks // LONGEST))
    return position == 0 or room >= blocks or position * room // blocks > (position - 1) * room // blocks


class Held(Protocol):
    """Stands for an input until backward."""

    def take(self) -> Tensor:
        """The input, which is then the caller's."""

    def look(self) -> Tensor:
        """The input. A later `take` gives it once more."""


class Kept:
    """An input that stays on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()

    def take(self) -> Tensor:
        """See `Held`."""
        return self._tensor

    look = take


class Run:
    """One forward of a block, to be done again.

    Args:
        forward: runs the block with gradients, but saves little of what it computes.
        args, kwargs: its arguments.
        places: of those that stand in `inputs` later, by `id`. They are not kept here.

    Attributes:
        inputs: what stands for these arguments.
        wanted: which of the tensors of numbers that the block gives back will be asked for.
    """

    def __init__(
        self, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], places: dict[int, Place]
    ) -> None:
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        given = [(i, leaf) for i, leaf in enumerate(leaves) if id(leaf) in places]
        self._leaves = [None if id(leaf) in places else leaf for leaf in leaves]
        self._places = [(i, places[id(leaf)], leaf.requires_grad) for i, leaf in given]
        self._forward = forward
        self._surroundings = _Surroundings(given[0][1].device)
        self._found: dict[int, Tensor] = {}
        self.inputs: dict[Place, Held] = {}
        self.wanted: set[int] = set()

    def result(self, index: int, *, last: bool) -> Tensor:
        """One of the tensors that are wanted. The block runs for the first one.

        Args:
            index: of the tensor, among those of numbers.
            last: whether nobody asks for it again.
        """
        if index not in self._found:
            self._found = {i: tensor for i, tensor in enumerate(self._compute()) if i in self.wanted}
        return self._found.pop(index) if last else self._found[index]

    def _compute(self) -> list[Tensor]:
        leaves = list(self._leaves)
        for i, place, requires_grad in self._places:
            leaves[i] = self.inputs[place].look().detach().requires_grad_(requires_grad)
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        with self._surroundings.again(), torch.enable_grad():  # compiled code without gradients would be other code
            return [tensor.detach() for tensor in float_tensors(self._forward(*args, **kwargs))]


class Result:
    """Stands for an input that the block before gives when it runs again."""

    def __init__(self, run: Run, index: int) -> None:
        self._run, self._index = run, index
        run.wanted.add(index)

    def take(self) -> Tensor:
        """See `Held`."""
        return self._run.result(self._index, last=True)

    def look(self) -> Tensor:
        """See `Held`."""
        return self._run.result(self._index, last=False)


class Chain:
    """The blocks that run one after the other in a forward, and which of their inputs are held."""

    def __init__(self) -> None:
        self._position = self._blocks = self._room = 0
        self._gave: dict[Place, int] = {}
        self._run: Run | None = None

    def enter(
        self, places: Collection[Place], blocks: Callable[[], int], room: Callable[[], int]
    ) -> dict[Place, Result]:
        """A block begins. What stands for its inputs if they are not to be held; else nothing.

        Args:
            places: of its inputs.
            blocks, room: tell the number of blocks, and for how many inputs there is room. A chain that begins asks.
        """
        run, self._run = self._run, None
        if not all(place in self._gave for place in places):
            self._position, self._blocks, self._room = 0, blocks(), room()
            return {}
        self._position += 1
        return {} if run is None else {place: Result(run, self._gave[place]) for place in places}

    @property
    def must_run_again(self) -> bool:
        """Whether the input of the next block is not to be held: then this one gives it once more."""
        return not is_held(self._position + 1, self._blocks, self._room)

    def leave(self, result: Any, run: Run | None) -> None:
        """A block ends.

        Args:
            result: what it gives back.
            run: gives it once more. None: the next input must be held.
        """
        self._gave = {place_of(tensor): i for i, tensor in enumerate(float_tensors(result)) if type(tensor) is Tensor}
        self._run = run


class _Surroundings:
    """The random numbers to come and autocast, as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._states = RandomStates(device)
        self._cache = torch.is_autocast_cache_enabled()
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context in which they are so again."""
        with ExitStack() as stack:
            stack.enter_context(self._states.again())
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._cache))
            yield
