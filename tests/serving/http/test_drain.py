"""Ends that are no failures: what was accepted is answered, nothing new is taken, the process leaves with 0."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch.distributed as dist

import bdlora_compile as bd
from bdlora_compile.serving.http import server as http_server
from bdlora_compile.serving.http.app import build
from bdlora_compile.serving.http.server import _Server
from tests.models import AdapterSpec, save_adapter, save_model
from tests.serving.conftest import SPEC, tokenizer_of
from tests.serving.http.fake import fake_service, until
from tests.serving.http.process import address, started

pytestmark = pytest.mark.timeout(200)

TOKENS = 490
"""Of a request; a row has 500. One row serves three of them one after the other, which takes seconds."""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str | Path]:
    model = save_model(SPEC, tmp_path / "model")
    tokenizer_of(SPEC.vocabulary).save_pretrained(model)
    adapter = save_adapter(AdapterSpec(rank=4), model, tmp_path / "a", 0)
    return [model, "--adapter", f"a={adapter}", "--max-rows", "1", "--max-length", "500", "--served-name", "base"]


def test_sigterm_drains(arguments: list[str | Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(arguments, log) as process:
        url = address(process, log, 150)
        with ThreadPoolExecutor(3) as pool:
            streams = [pool.submit(lambda: list(texts(url))) for _ in range(3)]
            until(lambda: "vllm:num_requests_waiting 2.0" in httpx.get(f"{url}/metrics").text)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/health").status_code == 503)
            assert httpx.get(f"{url}/health").json() == {"status": "draining"}
            refused = httpx.post(f"{url}/v1/completions", json={"model": "a", "prompt": [5]})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "unavailable"
            for stream in streams:
                assert len(stream.result(60)) == TOKENS
        assert process.wait(60) == 0, log.read_text()[-3000:]
    assert "drained" in log.read_text()


def test_a_launcher_that_is_killed_leaves_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passed on no signal; its ranks would hold their GPUs for ever."""
    engine, service = fake_service(port=0)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    server = _Server(build(service), service, engine)  # type: ignore[arg-type]  # a stand-in for the engine
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert asyncio.run(server.run()) == 0
    assert engine.drained == 1


def test_a_failure_while_draining_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher asks all ranks to end when one has died: `/health` is there to say so, and the status is 1."""
    engine, service = fake_service(port=0)
    monkeypatch.setattr(http_server, "_LAST_WORDS_SECONDS", 0.5)
    server = _Server(build(service), service, engine)  # type: ignore[arg-type]  # a stand-in for the engine

    async def main() -> int:
        running = asyncio.create_task(server.run())
        while not server.started:
            await asyncio.sleep(0.01)
        server._begin_drain()
        engine.failed = bd.LostRankError("rank 2", found="x", expected="y", remedy="z")
        await asyncio.sleep(0.3)
        assert not running.done()
        return await running

    assert asyncio.run(main()) == 1


def texts(url: str) -> Iterator[str]:
    """The texts of a streamed completion that ends as it should."""
    body = {"model": "a", "prompt": [5], "max_tokens": TOKENS, "stream": True, "ignore_eos": True, "seed": 3}
    reason, lines = None, []
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"logprobs": 0}, timeout=60) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                reason = choice["finish_reason"]
                if reason is None:
                    yield choice["text"]
    assert (reason, lines[-2]) == ("length", "data: [DONE]")
