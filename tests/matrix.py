"""`make test` runs a covering subset of the large products of layouts and features; `make test-matrix` runs the rest.

In the subset every layout meets every feature in some case. A case that only combines what other cases cover is written
`more(...)` in place of `(...)` in a parametrized list.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

VARIABLE = "AMT_TEST_MATRIX"  # set: the other cases run too


def more(*values: Any) -> Any:
    """A case for `make test-matrix` alone."""
    return pytest.param(*values, marks=pytest.mark.matrix)


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases of `more`, unless they are asked for."""
    if os.environ.get(VARIABLE):
        return
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=left_out)
