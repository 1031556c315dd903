"""A function that a GPU runs again and again on inputs of the same shapes, recorded once as a CUDA graph.

Launching a kernel costs the host more than a small kernel costs the device. A graph is launched as a whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from automodel_trainer.nn._torch import pytree, stop_allocating_to

Replay = Callable[[], None]
Call = Callable[[], Any]


class RecordedCall:
    """Calls a function of keyword arguments: once as it is, then while it is recorded, then by replaying the record.

    Results are those of the function itself. Tensors among the arguments are copied to where the record reads them, and
    what it writes is copied out. If a call differs in anything but the values of tensors, this and all later calls
    run as they are.

    Args:
        function: launches the same kernels at every call.
        held: the tensors that the function keeps from call to call. They must stay the same ones.
        warm_up: runs a call so that the next one can be recorded. It returns what that returned, and whether it can be.
        record: records a call without running it. It returns what the call returned, and the replay.

    Attributes:
        given_up: all calls run as they are from now on.
        refused: the function does what cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        held: Callable[[], Sequence[Tensor]],
        warm_up: Callable[[Call], tuple[Any, bool]] | None = None,
        record: Callable[[Call], tuple[Any, Replay]] | None = None,
    ) -> None:
        self.function, self.held = function, held
        self.warm_up = warm_up_on_gpu if warm_up is None else warm_up
        self.record = record_on_gpu if record is None else record
        self.given_up = self.refused = False
        self._kept: Sequence[Tensor] = ()
        self._inputs: list[Any] = []
        self._kind: Any = None
        self._output: Any = None
        self._replay: Replay | None = None

    def __call__(self, **kwargs: Any) -> Any:
        if self.given_up:
            return self.function(**kwargs)
        given, kind = pytree.tree_flatten(kwargs)
        if self._kind is None:
            return self._first(given, kind, kwargs)
        if kind != self._kind or not self._stayed() or not all(map(_alike, given, self._inputs)):
            return self._give_up(kwargs)
        if self._replay is None and not self._recorded(given):
            return self._give_up(kwargs)
        for mine, value in zip(self._inputs, given, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(value)
        assert self._replay is not None
        self._replay()
        return pytree.tree_map(_copy, self._output)

    def _first(self, given: list[Any], kind: Any, kwargs: dict[str, Any]) -> Any:
        self._inputs, self._kind, self._kept = given, kind, self.held()
        result, can_be_recorded = self.warm_up(lambda: self.function(**kwargs))
        self.given_up = self.refused = not can_be_recorded
        return result

    def _recorded(self, given: list[Any]) -> bool:
        self._inputs = [_copy(value) for value in given]
        kwargs = pytree.tree_unflatten(self._inputs, self._kind)
        try:
            self._output, self._replay = self.record(lambda: self.function(**kwargs))
        except RuntimeError:
            self.refused = True
            return False
        return True

    def _stayed(self) -> bool:
        now = self.held()
        return len(now) == len(self._kept) and all(a is b for a, b in zip(now, self._kept))

    def _give_up(self, kwargs: dict[str, Any]) -> Any:
        self.given_up = True
        self._output = self._replay = None
        self._inputs = []
        return self.function(**kwargs)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _alike(value: Any, other: Any) -> bool:
    """Whether two arguments are the same to a record, which reads the values of tensors anew."""
    if isinstance(value, Tensor):
        return (
            isinstance(other, Tensor)
            and value.shape == other.shape
            and value.dtype == other.dtype
            and value.device == other.device
        )
    return value is other or (
        type(value) is type(other) and isinstance(value, (bool, int, float, str)) and value == other
    )


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all records: cuBLAS keeps a workspace for every stream that it has run on."""
    return torch.cuda.Stream(device)


def warm_up_on_gpu(call: Call) -> tuple[Any, bool]:
    """Run `call` on the stream that records: libraries make there what they must not make in a record.

    Returns:
        what it returned, and whether it never waited for the device, which a record cannot.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = _on_side_stream(call)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return result, not any("synchroniz" in str(warning.message) for warning in caught)


def record_on_gpu(call: Call) -> tuple[Any, Replay]:
    """Record what `call` launches as a CUDA graph. Nothing is run.

    Raises:
        RuntimeError: `call` does what cannot be recorded.
    """
    graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
    before = last_graphs.get(device)

    def record() -> Any:
        # Other threads (of NCCL, of loaders) may do meanwhile what this one must not.
        graph.capture_begin(None if before is None else before.pool(), capture_error_mode="thread_local")
        try:
            return call()
        finally:
            graph.capture_end()

    try:
        result = _on_side_stream(record)
    except RuntimeError:
        stop_allocating_to(graph, device)
        raise
    last_graphs[device] = graph
    return result, graph.replay


# The last graph of each device. The next one takes over its memory, which nothing else could use: what was computed in
# it is gone by then. Without a graph that holds it, each would take memory of its own, until the device has no more.
last_graphs: dict[int, torch.cuda.CUDAGraph] = {}


def _on_side_stream(call: Call) -> Any:
    main = torch.cuda.current_stream()
    side = _side_stream(main.device_index)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = call()
    main.wait_stream(side)
    return result
