"""An engine that follows a script, for tests of the protocol alone; and a web server around it."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import uvicorn

import bdlora_compile as bd
from bdlora_compile.errors import BdloraError
from bdlora_compile.runtime.adapter_version import AdapterInfo
from bdlora_compile.serving.http.app import build
from bdlora_compile.serving.http.metrics import Metrics
from bdlora_compile.serving.http.service import Service
from bdlora_compile.serving.http.settings import ServeSettings, Tokens
from bdlora_compile.serving.http.words import Words
from bdlora_compile.serving.requests import Event, Finished, Request, Token, Usage
from bdlora_compile.serving.stats import EngineStats
from bdlora_compile.serving.stream import Stream
from tests.serving.conftest import tokenizer_of

BASE = "base"
ADMIN = "an-admin-token-of-tests"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


class FakeAdapters:
    """Names, and nothing behind them."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> AdapterInfo:
        return AdapterInfo(name, self.version(name), 8, (), 100, True, False, 0)

    def version(self, name: str) -> str:
        """Another one for each name."""
        return f"digest-of-{name}"

    def stats(self) -> Any:
        """As far as metrics need it."""
        return SimpleNamespace(slots=4)


@dataclass
class FakeEngine:
    """Answers token 10, 11, ... of a prompt's length; a stop text "<12>" is honoured. Held streams wait for `release`.

    Attributes:
        adapters: what is known.
        held: streams that have only begun; they are held while ``is_held``.
        refusal: raised by `submit`.
        ending: the error that requests end with.
    """

    adapters: FakeAdapters
    failed: BdloraError | None = None
    refusal: BdloraError | None = None
    ending: BdloraError | None = None
    is_held: bool = False
    held: list[Stream] = field(default_factory=list)
    submitted: list[Request] = field(default_factory=list)
    checks: int = 0
    drained: int = 0

    def submit(self, request: Request) -> Stream:
        """A stream that has ended already, or one that has only begun."""
        if self.refusal is not None:
            raise self.refusal
        if not all(token < 128 for token in request.prompt):
            raise bd.RequestError("prompt", found="an id", expected="one of the vocabulary", remedy="encode it")
        self.submitted.append(request)
        stream = Stream(request)
        events = list(self.script(request))
        if self.is_held:
            stream.publish(events[0])
            self.held.append(stream)
        else:
            for event in events:
                stream.publish(event)
        return stream

    def script(self, request: Request) -> Iterator[Event]:
        """What a request is answered."""
        sampling = request.sampling
        count = min(sampling.max_tokens, 5)
        for number in range(count):
            token = 10 + number + (sampling.seed or 0) % 50
            if f"<{token}>" in sampling.stop:
                yield Finished("stop", Usage(len(request.prompt), number), stop=f"<{token}>")
                return
            top = () if sampling.logprobs is None else ((token, -0.5), (3, -1.5))[: sampling.logprobs]
            yield Token(token, f"<{token}>", None if sampling.logprobs is None else -0.5, top)
        reason: Literal["length", "error"] = "length" if self.ending is None else "error"
        yield Finished(reason, Usage(len(request.prompt), count), self.ending)

    def check(self, timeout: float | None = None) -> float:
        """Counts."""
        self.checks += 1
        return 0.0

    def drain(self, timeout: float) -> bool:
        """Counts."""
        self.drained += 1
        return True

    def stats(self) -> EngineStats:
        """Held streams run."""
        running: dict[str | None, int] = {}
        for stream in self.held:
            running[stream.request.adapter] = running.get(stream.request.adapter, 0) + 1
        waiting: Mapping[str | None, int] = {"late": 2, None: 1}
        return EngineStats(running, waiting, 4, len(self.held), 0, 7, 8, 1, 1, 0.1, 0.1, {}, 0)

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Names are checked as `AdapterSet` does it."""
        if not name.replace("-", "").isalnum() or not name.isascii():
            raise bd.AdapterError(f"adapter name {name!r:.60}", found="x", expected="a pattern", remedy="rename it")
        self.adapters.names = (*self.adapters.names, name)
        return self.adapters[name]

    def unload_adapter(self, name: str) -> None:
        """Forget a name."""
        self.adapters.names = tuple(one for one in self.adapters.names if one != name)


@dataclass
class FakeServer:
    """A server on a port of its own.

    Attributes:
        url: without a path.
        engine, service: what is behind it.
    """

    url: str
    engine: FakeEngine
    service: Service


def fake_service(roots: tuple[str, ...] = (), **settings: Any) -> tuple[FakeEngine, Service]:
    """A service over a fake engine with adapters math and code."""
    adapters = FakeAdapters("math", "code")
    engine = FakeEngine(adapters)
    tokenizer = tokenizer_of(128)
    tokenizer.chat_template = TEMPLATE
    options = ServeSettings(model="unused", served_name=BASE, adapter_roots=roots, **settings)
    metrics = Metrics(engine.stats, lambda: (4, ["math"]), options.metrics_adapters)
    tokens = Tokens.model_validate({"admin_token": ADMIN})
    return engine, Service(engine, adapters, Words(tokenizer), options, tokens, metrics, int(time.time()))


@contextmanager
def running(service: Service, engine: FakeEngine) -> Iterator[FakeServer]:
    """uvicorn in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build(service), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield FakeServer(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, service)
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "a connection is left open"


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
