"""Which cases of a product `make test` runs, and which `make test-matrix` adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import matrix

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.mark.parametrize(("asked", "kept"), [("", ["a", "c"]), ("1", ["a", "b", "c"])])
def test_more_runs_only_if_asked_for(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, asked: str, kept: list[str]
) -> None:
    items: list[pytest.Item] = [
        pytest.Function.from_parent(request.node.parent, name=name, callobj=lambda: None) for name in ("a", "b", "c")
    ]
    for mark in matrix.more("a value").marks:
        items[1].add_marker(mark)
    deselected: list[pytest.Item] = []
    monkeypatch.setattr(request.config.hook, "pytest_deselected", lambda items: deselected.extend(items))
    monkeypatch.setenv(matrix.VARIABLE, asked)
    matrix.leave_out(request.config, items)
    assert [item.name for item in items] == kept
    assert len(items) + len(deselected) == 3


def test_make_asks_for_them() -> None:
    recipe = MAKEFILE.read_text().partition("\ntest-matrix:")[2].partition("\n\n")[0]
    assert f"{matrix.VARIABLE}=1" in recipe
    assert "-m matrix" in recipe
