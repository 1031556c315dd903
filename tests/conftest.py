from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No names are asked for (glibc): torch's store looks up the name of who connects, and waits 5 s for each lost answer.
os.environ.setdefault("RES_OPTIONS", "attempts:0")

import pytest
from hypothesis import HealthCheck, settings

from tests import matrix, rounding
from tests.pool import RankPool, forget_compiled, seldom_look_for_garbage
from tests.store import bucket, server  # noqa: F401

rounding.install()
# An example takes as long as the machine is busy.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--random-order", type=int, metavar="SEED", help="shuffle the files, and the tests of each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    matrix.leave_out(config, items)
    seed = config.getoption("random_order")
    if seed is not None:
        items[:] = shuffled(items, random.Random(seed))
    for item in items if rounding.wanted() else []:
        if item.get_closest_marker("exact"):
            item.add_marker(pytest.mark.skip(reason=f"is bit for bit, and {rounding.VARIABLE} is set"))


def pytest_collection_finish() -> None:
    seldom_look_for_garbage()


def shuffled(items: list[pytest.Item], dice: random.Random) -> list[pytest.Item]:
    """Files stay together: what they share is made once."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    return [item for file in dice.sample(list(files.values()), len(files)) for item in dice.sample(file, len(file))]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("random_order") is not None:
        terminalreporter.write_line(f"in random order: --random-order {config.getoption('random_order')}")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four gloo ranks, started once."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """A file finds nothing compiled."""
    forget_compiled()


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token caches go to a folder of the test session."""
    monkeypatch.setenv("AMT_CACHE", str(Path(tmp_path_factory.getbasetemp()) / "amt_cache"))
