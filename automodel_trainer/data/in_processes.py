"""Run a function over items in processes of one thread each, in order."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

AHEAD = 3  # items in flight for each process
FORKS = sys.platform == "linux"  # elsewhere a fork of a process with threads is not safe
_given: Any = None  # of a worker process

Given = TypeVar("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Given, Item], Result], given: Given, items: Iterable[Item], processes: int
) -> Iterator[Result]:
    """`function(given, item)` of each item, in their order. A few items are read ahead.

    Processes are forked on Linux. So they have `given`, and nothing is copied to them. Elsewhere `given` is pickled.

    Args:
        function: of a module, and with results that can be pickled.
        given: what every call gets.
        items: what one call each gets.
        processes: how many work at a time; 1 starts none.

    Raises:
        ValueError: a process was ended, most often because memory ran out. Errors of `function` are raised as they are.
    """
    if processes == 1:
        yield from (function(given, item) for item in items)
        return
    context = multiprocessing.get_context("fork" if FORKS else "spawn")
    with _one_thread_each():
        pool = ProcessPoolExecutor(processes, context, _start, (given,))
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_call, function, item))
                if len(waiting) >= AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that tokenizes rows was ended, most often because memory ran out. Use fewer processes "
                "(`taskset -c 0-3 …` gives the run four cores), or give it more memory."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tokenizers use one thread in every process that begins here."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start(given: Any) -> None:
    global _given
    _given = given


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_given, item)
