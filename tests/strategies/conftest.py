"""Lighthouses for tests of replica groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.beside import use


@pytest.fixture
def lighthouse(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from lit(monkeypatch, 1000)


@pytest.fixture
def patient_lighthouse(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On a busy machine some process of many says nothing for a second."""
    yield from lit(monkeypatch, 5000)


def lit(monkeypatch: pytest.MonkeyPatch, heartbeat: int) -> Iterator[str]:
    monkeypatch.setenv("RUST_LOG", "error")  # read at the import
    use("torchft")
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=60000, heartbeat_timeout_ms=heartbeat)
    yield server.address()
    server.shutdown()
