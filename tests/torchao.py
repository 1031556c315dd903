"""torchao for tests that need it.

`make` installs it beside the environment and not into it: where transformers finds it, it imports it everywhere, and
torchao complains about every kernel that a machine without GPU cannot load.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "torchao"


def use_torchao() -> None:
    """Make torchao importable in this process; skip the test where it is not installed."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    pytest.importorskip("torchao")
