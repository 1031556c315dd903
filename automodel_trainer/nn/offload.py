"""Keep the inputs of blocks, and their results of attention, in host memory from their forward to their backward.

A copy out runs beside the next block. In backward the input of the block before is fetched while a block runs. Host
memory is taken once, in pieces of one size, and used again in every step. Inputs that no longer fit are computed again
from the block before (`rerun.py`). Where that is not possible, they stay on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from automodel_trainer.nn._torch import pytree
from automodel_trainer.nn.float_tensors import float_tensors
from automodel_trainer.nn.host_memory import usable_host_memory
from automodel_trainer.nn.rerun import Chain, Held, Kept, Place, Run, place_of

PIECE = 16 * 2**20  # bytes
IN_FLIGHT = 2  # copies out that may run while more is computed
SMALL = 2**20  # bytes; smaller results stay on the device


class HostPieces:
    """Host memory in pieces, pinned for a GPU. A piece that is given back is used again.

    Args:
        device: the device that tensors are copied from.
        limit: the most bytes to take from the host.
        piece: bytes of a piece.
    """

    def __init__(self, device: torch.device, limit: int, piece: int = PIECE) -> None:
        self.limit, self.piece, self.held = limit, piece, 0
        self._pinned = device.type == "cuda"
        self._free: list[Tensor] = []

    def take(self, size: int) -> list[Tensor] | None:
        """Pieces that hold `size` bytes together; None if the limit does not allow them."""
        count = self.count(size)
        missing = max(0, count - len(self._free))
        if self.held + missing * self.piece > self.limit:
            return None
        for _ in range(missing):
            self._free.append(torch.empty(self.piece, dtype=torch.uint8, pin_memory=self._pinned))
            self.held += self.piece
        return [self._free.pop() for _ in range(count)]

    def room(self, sizes: Iterable[int]) -> int:
        """How often tensors of these bytes fit now."""
        return ((self.limit - self.held) // self.piece + len(self._free)) // sum(map(self.count, sizes))

    def count(self, size: int) -> int:
        """The pieces that hold `size` bytes."""
        return -(-size // self.piece)

    def give_back(self, pieces: list[Tensor]) -> None:
        """Let pieces be used again."""
        self._free += pieces


class CopyStream:
    """Runs copies beside the computation. On a CPU everything runs in order, and there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_computation(self) -> AbstractContextManager[Any]:
        """A context whose copies begin when what was computed until now is there."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.Event | None:
        """The end of the copies so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, end: torch.Event | None) -> None:
        """Let the computation wait for copies. The host does not wait."""
        if self._stream is not None and end is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(end)


class _Stored:
    """A dense tensor of any shape in host memory, and for a while on the device."""

    def __init__(self, tensor: Tensor, pieces: list[Tensor], owner: HostInputs, kind: str) -> None:
        self.pieces, self.pool, self.owner, self.kind = pieces, owner.pieces, owner, kind
        self.needed_next: list[ref[_Stored]] = []  # once this one is: results of the same block, the input of another
        self.taken = False
        self.on_device: Tensor | None = tensor.detach()
        self.shape, self.strides, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        self._copy(self.on_device, out=True)

    def fetch_early(self) -> None:
        """Begin to copy the tensor back, unless that was done before."""
        if not self.taken:
            self._fetch()

    def _fetch(self) -> None:
        if self.on_device is None:
            self.on_device = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
            self._copy(self.on_device, out=False)

    def take(self) -> Tensor:
        """The tensor on the device, which is then the caller's. Those that are needed next begin to come."""
        tensor = self.look()
        self.on_device = None
        self.taken = True
        return tensor

    def look(self) -> Tensor:
        """The tensor, which stays on the device until it is taken."""
        self._fetch()
        self.owner.copies.wait(self.copied)
        self.owner.stay(self)
        for reference in self.needed_next:
            if (other := reference()) is not None:
                other.fetch_early()
        assert self.on_device is not None
        return self.on_device

    def leave(self) -> None:
        """Free the tensor on the device once it is copied."""
        self.owner.copies.wait(self.copied)
        self.on_device = None

    def _copy(self, tensor: Tensor, *, out: bool) -> None:
        flat = tensor.as_strided((tensor.numel(),), (1,))
        parts = flat.view(torch.uint8).split(self.pool.piece)
        with self.owner.copies.after_computation():
            for part, piece in zip(parts, self.pieces, strict=True):
                if out:
                    piece[: len(part)].copy_(part, non_blocking=True)
                else:
                    part.copy_(piece[: len(part)], non_blocking=True)
        self.copied = self.owner.copies.mark()

    def __del__(self) -> None:
        self.owner.forget(self)  # a later copy into its pieces waits in the same stream


class HostInputs:
    """Holds the inputs of blocks in host memory, and their results of attention where the inputs of all leave room.

    Args:
        limit: the most bytes of host memory; None: what is free at the first input, less a third of it or 48 GiB,
            shared by `ranks`.
        ranks: processes of this host that do the same.
        piece: bytes of a piece of host memory.

    Attributes:
        blocks: tells the number of blocks whose inputs it is to hold.
        full: whether an input stayed on the device because the limit was reached.
        again: whether an input was left to be computed again, for the same reason.
    """

    pieces: HostPieces
    copies: CopyStream

    def __init__(self, limit: int | None = None, ranks: int = 1, piece: int = PIECE) -> None:
        self._limit, self._ranks, self._piece = limit, ranks, piece
        self.blocks: Callable[[], int] = lambda: 0
        self._begin()

    def _begin(self) -> None:
        self._ready = self.full = self.again = False
        self._leaving: deque[_Stored] = deque()
        self._last: ref[_Stored] | None = None  # input
        self._chain = Chain()
        self._kept_results = self._left_results = False
        self._input_bytes = self._result_bytes = 0

    def around(self, forward: Callable[..., Any], again: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of a block; what autograd saves of its input goes to the host.

        The input is the first argument that holds tensors of numbers, in a tuple perhaps. What all blocks share, such
        as masks and positions, comes after it.

        Args:
            forward: saves nothing but the arguments.
            again: the same, for backward, where the block may have to give its result once more. None: it cannot.
        """
        inputs = _inputs(args, kwargs)
        if not inputs:
            return forward(*args, **kwargs)
        self._prepare(inputs[0].device)
        places = {id(leaf): place_of(leaf) for leaf in inputs}
        sizes = {places[id(leaf)]: leaf.nbytes for leaf in inputs}
        given = self._chain.enter(sizes, self.blocks, partial(self.pieces.room, sizes.values()))
        self.again |= bool(given)
        run = Run(again, args, kwargs, places) if again is not None and self._chain.must_run_again else None
        held: dict[Place, Held] = {} if run is None else run.inputs

        def pack(tensor: Tensor) -> Any:
            place = place_of(tensor) if type(tensor) is Tensor else None
            if place not in sizes:
                return tensor
            held[place] = given[place] if given else self._store_input(tensor)
            return held[place]

        with saved_tensors_hooks(pack, self._restore):
            result = forward(*args, **kwargs)
        self._chain.leave(result, run)
        return result

    @property
    def held(self) -> int:
        """Bytes of host memory in use."""
        return self.pieces.held if self._ready else 0

    @property
    def limit(self) -> int:
        """The most bytes of host memory; 0 before the first input."""
        return self.pieces.limit if self._ready else 0

    @property
    def results(self) -> Literal["all", "some", "none"]:
        """Whether results of attention were kept until now. The rest are computed again."""
        if not self._kept_results:
            return "none"
        return "some" if self._left_results else "all"

    def release(self) -> None:
        """Give the host memory back, once no graph needs it, and begin anew."""
        self._begin()
        self.__dict__.pop("pieces", None)

    def keep(self, tensor: Tensor) -> Any:
        """What stands for a result of attention until `kept`; None: the inputs of all blocks leave no room for it."""
        if tensor.nbytes < SMALL or not self._ready:
            return tensor.detach()
        room = self.pieces.limit - self.blocks() * self._input_bytes - self._result_bytes
        stored = self._store(tensor, "result") if tensor.nbytes <= room else None
        self._kept_results |= stored is not None
        self._left_results |= stored is None
        block = None if self._last is None else self._last()
        if stored is not None and block is not None:
            block.needed_next.insert(0, ref(stored))
        return stored

    def kept(self, entry: Any) -> Tensor:
        """The result that an entry stands for."""
        return self._restore(entry)

    def forget(self, stored: _Stored) -> None:
        """Use the memory of a tensor that nobody needs any more again, once it is copied."""
        if stored.on_device is not None:  # fetched, and its graph was dropped
            self.copies.wait(stored.copied)
        stored.pool.give_back(stored.pieces)
        if stored.kind == "result" and stored.pool is self.__dict__.get("pieces"):
            self._result_bytes -= len(stored.pieces) * self._piece

    def stay(self, stored: _Stored) -> None:
        """Do not free a tensor on the device that is used again."""
        if stored in self._leaving:
            self._leaving.remove(stored)

    def _prepare(self, device: torch.device) -> None:
        if self._ready:
            return
        if self._limit is None:  # once: torch keeps pinned memory that was released, and it is taken again
            self._limit = usable_host_memory(self._ranks)
        self.pieces, self.copies = HostPieces(device, self._limit, self._piece), CopyStream(device)
        self._ready = True

    def _store_input(self, tensor: Tensor) -> Held:
        self._input_bytes = self.pieces.count(tensor.nbytes) * self._piece
        stored = self._store(tensor, "input")
        if stored is None:
            self.full = True
            return Kept(tensor)
        if self._last is not None:
            stored.needed_next.append(self._last)
        self._last = ref(stored)
        return stored

    def _store(self, tensor: Tensor, kind: str) -> _Stored | None:
        pieces = self.pieces.take(tensor.nbytes)
        if pieces is None:
            return None
        stored = _Stored(tensor, pieces, self, kind)
        if kind == "result":
            self._result_bytes += len(pieces) * self._piece
        self._leaving.append(stored)
        while len(self._leaving) > IN_FLIGHT:
            self._leaving.popleft().leave()
        return stored

    def _restore(self, saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved.take()  # type: ignore[no-any-return]


def _inputs(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The dense tensors among the arguments that lie where the first argument with floating-point tensors does."""
    first: list[Tensor] = next(filter(None, map(float_tensors, (*args, *kwargs.values()))), [])
    wanted = {tensor.untyped_storage().data_ptr() for tensor in first}
    dense = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if type(leaf) is Tensor and leaf.is_contiguous()]
    return [leaf for leaf in dense if leaf.numel() and leaf.untyped_storage().data_ptr() in wanted]
