"""Where the main thread of a program spends its time, as a tree of calls.

`python benchmarks/sampled.py OUT -m MODULE ARGUMENTS…` runs a module and writes the tree to the file OUT. A thread
looks at the main thread's stack every 10 ms. cProfile slows a start of many small calls down to twice its time, and
since Python 3.12 it adds the time of all threads.
"""

from __future__ import annotations

import atexit
import runpy
import sys
import threading
import time
from pathlib import Path
from types import FrameType

EVERY = 0.01  # seconds
SHOWN = 0.2  # seconds: what took less is left out

Calls = dict[tuple[str, str], "Node"]


class Node:
    """A function as it was called from its parent: seconds, and the calls within."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: Calls = {}

    def add(self, stack: list[tuple[str, str]], seconds: float) -> None:
        """Count `seconds` for every function of a stack, outermost first."""
        node = self
        for function in stack:
            node = node.calls.setdefault(function, Node())
            node.seconds += seconds

    def lines(self, depth: int = 0) -> list[str]:
        """The tree as text, longest first. A chain of calls that all took the same time is one line."""
        found = []
        for (file, name), node in sorted(self.calls.items(), key=lambda item: -item[1].seconds):
            if node.seconds < SHOWN:
                break
            label = f"{_short(file)}:{name}"
            while len(longest := [call for call in node.calls.items() if call[1].seconds > 0.95 * node.seconds]) == 1:
                (file, name), node = longest[0]
            if label != f"{_short(file)}:{name}":
                label += f" … {_short(file)}:{name}"
            found += [f"{'  ' * depth}{node.seconds:.1f} {label}", *node.lines(depth + 1)]
        return found


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])


def _stack(frame: FrameType | None) -> list[tuple[str, str]]:
    found = []
    while frame:
        if "importlib" not in frame.f_code.co_filename:
            found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def start(target: Path) -> None:
    """Sample the main thread from now on, and write the tree to `target` when the program ends."""
    main, tree, done = threading.main_thread().ident, Node(), threading.Event()
    assert main is not None

    def sample() -> None:
        last = time.perf_counter()
        while not done.wait(EVERY):
            now = time.perf_counter()
            tree.add(_stack(sys._current_frames().get(main)), now - last)
            last = now

    def write() -> None:
        done.set()
        target.write_text("\n".join(tree.lines()) + "\n")

    threading.Thread(target=sample, daemon=True).start()
    atexit.register(write)


if __name__ == "__main__":
    target, _, module = sys.argv[1:4]
    sys.argv = [module, *sys.argv[4:]]
    start(Path(target))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
