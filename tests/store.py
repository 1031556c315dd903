"""An S3-compatible store on this machine, for tests of URLs. One a process: fsspec keeps its connections."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest


@pytest.fixture(scope="session")
def server() -> Iterator[dict[str, str]]:
    """The environment variables that lead to it."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture
def bucket(server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of an empty bucket."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    name = "s3://" + "".join(c for c in request.node.name if c.isalnum())[:40].lower()
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return name
