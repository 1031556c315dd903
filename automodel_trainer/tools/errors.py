"""Print errors of commands for users."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from yaml import YAMLError

_OF_FILES = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip


def explain_errors(run: Callable[[], None]) -> None:
    """Call `run` and print this project's errors for users without a traceback.

    These are the ValueErrors that the project's own code raises, faults of YAML, and what the system says of a file
    that cannot be written or read (no space, no permission, no folder). Any other error is a bug and keeps its
    traceback.

    Raises:
        SystemExit: with code 1, after such an error.
    """
    try:
        run()
    except ValueError as error:
        if os.environ.get("AMT_TRACEBACK") or not _is_ours(error):
            raise
        _exit(error)
    except YAMLError as error:
        if os.environ.get("AMT_TRACEBACK"):
            raise
        _exit(f"a YAML file cannot be read: {error}")
    except OSError as error:
        if os.environ.get("AMT_TRACEBACK") or error.errno not in _OF_FILES:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _exit(f"{error.strerror}{where}. Look at the folder: its name, its permissions, and the space on its disk.")


def _exit(message: object) -> NoReturn:
    print(f"\namt: {message}\n(set AMT_TRACEBACK=1 to see where it was raised)", file=sys.stderr)
    raise SystemExit(1) from None


def _is_ours(error: BaseException) -> bool:
    """Whether this package's own code raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parents[1]
    homes = (package, package.parent / "strategies", package.parent / "callbacks")
    return bool(frames) and any(home in Path(frames[-1].filename).resolve().parents for home in homes)
