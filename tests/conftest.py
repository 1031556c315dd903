from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No names are asked for (glibc): torch's store looks up the name of who connects, and waits 5 s for each lost answer.
os.environ.setdefault("RES_OPTIONS", "attempts:0")

import pytest
from hypothesis import HealthCheck, settings

from tests.pool import RankPool

# An example takes as long as the machine is busy.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four gloo ranks, started once."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token caches go to a folder of the test session."""
    monkeypatch.setenv("AMT_CACHE", str(Path(tmp_path_factory.getbasetemp()) / "amt_cache"))
