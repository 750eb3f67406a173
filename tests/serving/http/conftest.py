"""One web server around a fake engine; each test gets it as it was at the start."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serving.http.fake import FakeServer, fake_service, running


@pytest.fixture(scope="package")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    root = tmp_path_factory.mktemp("roots")
    for name in ("law", "poems"):
        (root / name).mkdir()
    engine, service = fake_service((str(root),), max_body_bytes=20_000, request_timeout=1, body_timeout=1)
    with running(service, engine) as server:
        yield server


@pytest.fixture
def server(shared_server: FakeServer) -> Iterator[FakeServer]:
    engine, service = shared_server.engine, shared_server.service
    yield shared_server
    engine.failed = engine.refusal = engine.ending = None
    engine.is_held = service.is_draining = False
    engine.adapters.names = ("math", "code")
    engine.held.clear()
    engine.submitted.clear()


@pytest.fixture
def client(server: FakeServer) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def root(shared_server: FakeServer) -> Path:
    """Where adapters may be loaded from."""
    return Path(shared_server.service.settings.adapter_roots[0])
