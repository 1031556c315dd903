"""What a command prints when it fails."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def explain_errors(run: Callable[[], None]) -> None:
    """Print what this project says to its users without a traceback; anything else is a bug and keeps its own."""
    try:
        run()
    except ValueError as error:
        if os.environ.get("AMT_TRACEBACK") or not _is_ours(error):
            raise
        print(f"\namt: {error}\n(AMT_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        raise SystemExit(1) from None


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code, on purpose."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parents[1]
    homes = (package, package.parent / "strategies", package.parent / "callbacks")
    return bool(frames) and any(home in Path(frames[-1].filename).resolve().parents for home in homes)
