"""torchao and bitsandbytes for tests that need them.

`make` installs them beside the environment and not into it: where transformers finds them, it imports them everywhere,
and both complain about every kernel that a machine without GPU cannot load.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def folder_of(name: str) -> Path:
    """Where `make` puts a library."""
    return Path(sys.prefix) / name


def use(*names: str) -> None:
    """Make libraries importable in this process; skip the test where one is not installed."""
    for name in names:
        if folder_of(name).is_dir() and str(folder_of(name)) not in sys.path:
            sys.path.append(str(folder_of(name)))
        pytest.importorskip(name)
