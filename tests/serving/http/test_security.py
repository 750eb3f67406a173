"""Who may do what, and what hostile clients cannot do."""

import logging
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.routing import APIRoute
from pydantic import SecretStr

from bdlora_compile.errors import ConfigError
from bdlora_compile.serving.http.app import build
from bdlora_compile.serving.http.server import main
from bdlora_compile.serving.http.service import Service
from bdlora_compile.serving.http.settings import ServeSettings, Tokens
from tests.serving.http.fake import ADMIN, BASE, FakeServer, fake_service, until

AS_ADMIN = {"Authorization": f"Bearer {ADMIN}"}
OPEN = {"/health", "/metrics", "/openapi.json"}
"""Routes without any token."""


def routes(service: Service) -> dict[str, str]:
    """Method of each path."""
    found = build(service).openapi()["paths"]
    return {path: next(iter(methods)).upper() for path, methods in found.items()}


def test_every_route_asks_for_its_token(server: FakeServer) -> None:
    """All routes that there are, found by walking them: a new one without a token fails here."""
    _, service = fake_service()
    service.tokens = Tokens.model_validate({"api_key": "a-key-of-users", "admin_token": ADMIN})
    found = routes(service)
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions", "/v1/models"} <= set(found)
    application = build(service)
    with httpx.Client(transport=_Direct(application), base_url="http://test") as client:
        for path, method in found.items():
            if path in OPEN:
                continue
            place = path.replace("{model}", BASE)
            wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {ADMIN}"}]
            if path.endswith("lora_adapter"):
                wrong.append({"Authorization": "Bearer a-key-of-users"})
            for headers in wrong:
                answer = client.request(method, place, headers=headers, json={})
                assert answer.status_code == 401, (path, headers)
                assert answer.json()["error"]["type"] == "authentication_error"


class _Direct(httpx.BaseTransport):
    """Calls an application without a network."""

    def __init__(self, app: Any) -> None:
        from starlette.testclient import TestClient  # it brings an event loop

        self._client = TestClient(app, raise_server_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """One call."""
        body = request.read()
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        found = self._client.request(request.method, request.url.raw_path.decode(), headers=headers, content=body)
        return httpx.Response(found.status_code, headers=dict(found.headers), content=found.content)


def test_admin_routes_are_not_there_by_default() -> None:
    _, service = fake_service()
    service.tokens = Tokens.of_environment()
    assert not [path for path in routes(service) if "lora" in path]


def test_no_route_is_left_out_of_the_walk() -> None:
    _, service = fake_service()
    application = build(service)
    paths = {route.path for route in application.routes if isinstance(route, APIRoute)}
    assert {path.replace("{model:path}", "{model}") for path in paths} <= set(routes(service))


@pytest.mark.parametrize(
    "path",
    [
        "../law",
        "/etc",
        "law/../../x",
        "%2e%2e/law",
        "law\x00",
        "law\\..",
        "",
        ".",
        "link",
        "fifo",
        "x" * 10_000,
        "l\u0430w",
        "org/repo",
        "{root}/../roots-other",
        "{root}",
    ],
)
def test_paths_do_not_leave_the_roots(server: FakeServer, root: Path, tmp_path: Path, path: str) -> None:
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("/etc")
        os.mkfifo(root / "fifo")
    asked = {"lora_name": "new", "lora_path": path.replace("{root}", str(root))}
    answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=asked, headers=AS_ADMIN)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lora_path"
    assert "new" not in server.engine.adapters


def test_load_and_unload(server: FakeServer, root: Path) -> None:
    def call(route: str, **asked: object) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/{route}_lora_adapter", json=asked, headers=AS_ADMIN)

    loaded = call("load", lora_name="law", lora_path="law")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'law' added successfully.")
    assert "law" in httpx.get(f"{server.url}/v1/models").text
    assert call("load", lora_name="law", lora_path="law").json()["error"]["code"] == "already_loaded"
    assert call("load", lora_name="law", lora_path=str(root / "law"), load_inplace=True).status_code == 200
    missing = call("load", lora_name="other", lora_path=str(root / "nothing"))
    assert missing.status_code == 400
    assert str(root) not in missing.text, "paths of the machine are not told"
    assert call("load", lora_name=BASE, lora_path="law").status_code == 400
    assert call("unload", lora_name="law").text == "Success: LoRA adapter 'law' removed successfully."
    assert call("unload", lora_name="law").status_code == 404


def test_large_bodies_are_refused_before_they_are_read(server: FakeServer) -> None:
    body = b'{"model": "base", "prompt": "' + b"x" * 30_000 + b'"}'
    headers = {"Content-Type": "application/json"}
    stated = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    pieces = httpx.post(f"{server.url}/v1/completions", content=iter([body[:15_000], body[15_000:]]), headers=headers)
    for answer in (stated, pieces):
        assert answer.status_code == 413
        assert "20000 bytes" in answer.json()["error"]["message"]


def test_a_body_that_does_not_come_is_given_up(server: FakeServer) -> None:
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(1000)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 9000, b'{"model": NaN}', b"null", b'{"model": "base", "prompt": 1e999}']
)
def test_bodies_that_are_no_requests(server: FakeServer, body: bytes) -> None:
    for route in ("completions", "chat/completions"):
        answer = httpx.post(f"{server.url}/v1/{route}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


HOSTILE = [
    "a\nb 200 forged line",
    'x"} 1\nvllm:evil{a="',
    "<script>alert(1)</script>",
    "\x1b[31mred",
    "\u202eevil",
    "z" * 9000,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_reach_neither_metrics_nor_logs(
    server: FakeServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    before = httpx.get(f"{server.url}/metrics").text
    answers = [
        httpx.post(f"{server.url}/v1/completions", json={"model": name, "prompt": "<5>"}),
        httpx.get(f"{server.url}/v1/models/{name}") if name.isprintable() and len(name) < 100 else None,
        httpx.post(
            f"{server.url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "law"}, headers=AS_ADMIN
        ),
        httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name}, headers=AS_ADMIN),
    ]
    assert [answer.status_code for answer in answers if answer is not None][-3:-2] in ([404], [])
    for answer in answers:
        if answer is not None:
            assert answer.status_code in (400, 404)
            assert len(answer.text) < 2000
            assert not any(ord(char) < 32 for char in answer.json()["error"]["message"])
    assert sample_names(httpx.get(f"{server.url}/metrics").text) == sample_names(before)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("bdlora_compile")]
    assert not any(name in message for message in ours)


def test_unknown_names_leave_nothing(server: FakeServer) -> None:
    before = httpx.get(f"{server.url}/metrics").text
    with httpx.Client() as client:
        for index in range(300):
            client.post(f"{server.url}/v1/completions", json={"model": f"unknown-{index}", "prompt": "<5>"})
    after = httpx.get(f"{server.url}/metrics").text
    assert sample_names(after) == sample_names(before)


def sample_names(text: str) -> list[str]:
    """Series without their values, and without what changes with the time."""
    return [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]


def test_weak_tokens_are_refused_and_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDLORA_ADMIN_TOKEN", "short")
    with pytest.raises(ConfigError, match="admin_token") as caught:
        Tokens.of_environment()
    assert "short'" not in str(caught.value)
    monkeypatch.setenv("BDLORA_ADMIN_TOKEN", "long-enough-for-anybody")
    monkeypatch.setenv("BDLORA_API_KEY", "long-enough-for-anybody")
    with pytest.raises(ConfigError, match="choose another"):
        Tokens.of_environment()
    monkeypatch.setenv("BDLORA_API_KEY", "the-users-key")
    assert Tokens.of_environment().api_key == SecretStr("the-users-key")
    assert "the-users-key" not in repr(Tokens.of_environment())


def test_settings_come_from_a_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('tp = 2\nport = 9000\ntarget_modules = ["q_proj"]\n[adapters]\nmath = "a"\n')
    settings = ServeSettings.of(file, {"model": "m", "port": 1234, "host": None, "adapters": {"law": "b"}})
    assert (settings.tp, settings.port, settings.host) == (2, 1234, "127.0.0.1")
    assert settings.adapters == {"math": "a", "law": "b"}
    assert ServeSettings.model_validate_json(settings.model_dump_json()).target_modules == ("q_proj",)
    for text, said in (("ports = 1", "ports"), ("port = 1e9", "port"), ("=", "TOML"), ('admin_token = "x"', "admin")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            ServeSettings.of(file, {"model": "m"})
    with pytest.raises(ConfigError, match="name of the base model"):
        ServeSettings.of(None, {"model": "m", "adapters": {"m": "x"}})


def test_ranks_that_torchrun_starts_read_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tp` is then how many there are; here there is one."""
    file = tmp_path / "serve.toml"
    file.write_text('model = "m"\ntp = 8\n')
    assert main(["--config", str(file)]) == 2
    assert "tp: found 8, expected 1" in capsys.readouterr().err


def test_a_slow_reader_does_not_stop_others(server: FakeServer) -> None:
    server.engine.is_held = True
    body = {"model": BASE, "prompt": "<5>", "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body):
        server.engine.is_held = False
        assert httpx.post(f"{server.url}/v1/completions", json=body | {"stream": False}).status_code == 200
    until(lambda: server.engine.held[0].is_cancelled)
