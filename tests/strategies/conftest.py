"""Lighthouses for tests of replica groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.beside import use


@pytest.fixture
def lighthouse(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A patient one: on a busy machine some process of many says nothing for a second."""
    monkeypatch.setenv("RUST_LOG", "error")  # read at the import
    use("torchft")
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=60000, heartbeat_timeout_ms=5000)
    yield server.address()
    server.shutdown()
