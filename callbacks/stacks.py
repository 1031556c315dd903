"""What the threads of a process are doing, read from another of its threads."""

from __future__ import annotations

import faulthandler
import sys
import threading
from pathlib import Path
from types import FrameType

_TORCH = "torch/distributed/"
_WRAPPERS = ("wrapper", "decorate_context", "_fn")


def current_call() -> tuple[str, str]:
    """The collective that this process is in ("" if none can be seen), and the line that its main thread is at.

    Collectives of a backward pass may be called from autograd's own threads, so all threads are looked at.
    """
    frames = sys._current_frames()
    main = frames.pop(threading.main_thread().ident or 0, None)
    frames.pop(threading.get_ident(), None)
    found = next((name for frame in (main, *frames.values()) if (name := _collective(frame))), "")
    return found, "" if main is None else _line(main)


def _collective(frame: FrameType | None) -> str:
    """The innermost function of torch.distributed that a thread is in."""
    while frame is not None:
        if _TORCH in frame.f_code.co_filename and frame.f_code.co_name not in _WRAPPERS:
            return frame.f_code.co_name
        frame = frame.f_back
    return ""


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


def dump_stacks(file: Path) -> None:
    """Write the Python stack of every thread of this process to `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        faulthandler.dump_traceback(stream, all_threads=True)
