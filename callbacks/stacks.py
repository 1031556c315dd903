"""Read the stacks of all threads of this process from one of its threads."""

from __future__ import annotations

import faulthandler
import sys
import threading
from pathlib import Path
from types import FrameType

_TORCH = "torch/distributed/"  # part of the path of files that define collectives
_WRAPPERS = ("wrapper", "decorate_context", "_fn")  # names of decorators' functions, which tell nothing

# Innermost Python frames of a thread that waits: what they call is C++. Tensors' own code (`torch/distributed/tensor`)
# and what wraps a forward (`algorithms`) compute.
_WAITS = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/fsdp/",
    "torch/distributed/pipelining/",
    "torch/cuda/__init__.py",
    "torch/accelerator/__init__.py",
    "torch/futures/__init__.py",
    "torchft/manager.py",
)
_OTHER_THREADS = ("threading.py", "concurrent/futures/_base.py")  # here it waits for a thread that works for its caller
_AUTOGRAD = "torch/autograd/graph.py"


def current_call() -> tuple[str, str]:
    """The collective that this process is in ("" if none is found), and the current line of its main thread.

    We look at all threads, because autograd may call the collectives of a backward from its own threads.
    """
    frames = sys._current_frames()
    main = frames.pop(threading.main_thread().ident or 0, None)
    frames.pop(threading.get_ident(), None)
    found = next((name for frame in (main, *frames.values()) if (name := _collective(frame))), "")
    return found, "" if main is None else _line(main)


def _collective(frame: FrameType | None) -> str:
    """Name of the innermost function of torch.distributed on a stack; "" if there is none."""
    while frame is not None:
        if _TORCH in frame.f_code.co_filename and frame.f_code.co_name not in _WRAPPERS:
            return frame.f_code.co_name
        frame = frame.f_back
    return ""


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


def frame_of(thread_id: int) -> FrameType | None:
    """The innermost Python frame of a thread; None if it has ended."""
    return sys._current_frames().get(thread_id)


def waits_for_ranks(frame: FrameType) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks or replica groups, or for its device."""
    while frame.f_code.co_filename.endswith(_OTHER_THREADS) and frame.f_back is not None:
        frame = frame.f_back
    return any(part in frame.f_code.co_filename for part in _WAITS)


def in_backward(frame: FrameType) -> bool:
    """Whether a thread whose innermost frame this is has called the C++ code of autograd."""
    return frame.f_code.co_filename.endswith(_AUTOGRAD)


def dump_stacks(file: Path) -> None:
    """Write the Python stack of every thread of this process to `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        faulthandler.dump_traceback(stream, all_threads=True)
