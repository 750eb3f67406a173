"""The process of one rank: rank 0 serves HTTP over the engine, the others follow it."""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedModel

from bdlora_compile.errors import BdloraError, ConfigError
from bdlora_compile.model import load, release_graphs
from bdlora_compile.model_config import read_tokenizer
from bdlora_compile.ranks import Ranks
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.serving.engine import Engine
from bdlora_compile.serving.following import follow
from bdlora_compile.serving.http import app as application
from bdlora_compile.serving.http.metrics import Metrics
from bdlora_compile.serving.http.service import Service
from bdlora_compile.serving.http.settings import ServeSettings, Tokens
from bdlora_compile.serving.http.words import Words

_LOG = logging.getLogger("bdlora_compile.http")

_WATCH_SECONDS = 0.2
"""How often a failure of the engine is looked for."""

_LAST_WORDS_SECONDS = 3.0
"""After a failure: time in which clients get their error events, and load balancers see that `/health` is 503."""


def serve(settings: ServeSettings, tokens: Tokens) -> int:
    """Load, compile and serve on this rank until SIGTERM or a failure; the exit status."""
    model, adapters = load(
        settings.model,
        settings.adapters,
        max_adapters=settings.max_adapters,
        max_rank=settings.max_rank,
        max_local_rank=settings.max_local_rank,
        target_modules=settings.target_modules,
        pool_bytes=settings.pool_bytes,
        host_bytes=settings.host_bytes,
        strategy=settings.strategy,
        ranks=Ranks.of_process_group(),
    )
    model.compile(backend="bdlora", options={"inner": settings.inner} if settings.inner else None)
    try:
        return _serve(model, adapters, settings, tokens)
    finally:
        # The process group ends after this.
        release_graphs(model)


def _serve(model: PreTrainedModel, adapters: AdapterSet, settings: ServeSettings, tokens: Tokens) -> int:
    """On rank 0; the others follow. The exit status."""
    with follow(model, adapters, timedelta(seconds=settings.step_timeout)) as drives:
        if not drives:
            return 0
        tokenizer = read_tokenizer(settings.model)
        engine = Engine(
            model,
            adapters,
            tokenizer,
            max_rows=settings.max_rows,
            max_length=settings.max_length,
            max_waiting=settings.max_waiting,
            max_waiting_per_adapter=settings.max_waiting_per_adapter,
            step_timeout=settings.step_timeout,
        )
        with engine:
            service = service_of(engine, adapters, tokenizer, settings, tokens)
            return asyncio.run(_Server(application.build(service), service, engine).run())


def service_of(
    engine: Engine, adapters: AdapterSet, tokenizer: Any, settings: ServeSettings, tokens: Tokens
) -> Service:
    """What the routes share."""

    def resident() -> tuple[int, list[str]]:
        return adapters.stats().slots, [name for name in adapters.names if _is_resident(adapters, name)]

    metrics = Metrics(engine.stats, resident, settings.metrics_adapters)
    return Service(engine, adapters, Words(tokenizer), settings, tokens, metrics, int(time.time()))


def _is_resident(adapters: AdapterSet, name: str) -> bool:
    try:
        return adapters[name].is_resident
    except BdloraError:
        # It was unloaded since its name was read.
        return False


class _Server(uvicorn.Server):
    """uvicorn, with our own ends: SIGTERM drains, so does the launcher's death, and a failed engine ends the process.

    Args:
        app: what it serves.
        service: to be told of draining.
        engine: drained and watched.
    """

    def __init__(self, app: FastAPI, service: Service, engine: Engine) -> None:
        settings = service.settings
        # An answer that was complete in the engine still has to reach its client.
        config = uvicorn.Config(
            app,
            settings.host,
            settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service = service
        self._engine = engine
        self._status = 0
        self._launcher = os.getppid() if dist.is_torchelastic_launched() else None
        self._drain: asyncio.Task[None] | None = None

    async def run(self) -> int:  # type: ignore[override]  # in the loop that we run
        """Serve until the end; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._begin_drain)
        watch = asyncio.create_task(self._watch())
        await self.serve()
        watch.cancel()
        return self._status

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own handlers would close the port at once."""
        yield

    async def startup(self, sockets: Any = None) -> None:
        """Say where the server is once it listens."""
        await super().startup(sockets)
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                print(f"serving {self._service.settings.base_name} on http://{host}:{port}", flush=True)

    def _begin_drain(self) -> None:
        if self._drain is not None:
            # Asked twice: whoever asks does not want to wait.
            self.should_exit = self.force_exit = True
            return
        self._service.is_draining = True
        _LOG.info("draining: no new requests, running ones have %g s", self._service.settings.drain_timeout)
        self._drain = asyncio.create_task(self._end_after_drain())

    async def _end_after_drain(self) -> None:
        all_ended = await asyncio.to_thread(self._engine.drain, self._service.settings.drain_timeout)
        if self._engine.failed is not None:
            # A launcher asks all ranks to end when one has died: `_watch` tells the clients first.
            return
        _LOG.info("drained" if all_ended else "the rest was cancelled")
        self.should_exit = True

    async def _watch(self) -> None:
        while self._engine.failed is None:
            await asyncio.sleep(_WATCH_SECONDS)
            if self._launcher not in (None, os.getppid()) and self._drain is None:
                # It was killed, and can pass on no signal: nobody would ever end these processes.
                _LOG.error("the launcher of the ranks has died")
                self._begin_drain()
        self._status = 1
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        self.should_exit = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of one rank's process, started by ``bdlora serve`` or by torchrun."""
    parser = argparse.ArgumentParser(prog="bdlora_compile.serving.http.server", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="ServeSettings as a TOML file: what `bdlora serve --config` takes")
    source.add_argument("--settings", help="ServeSettings as JSON")
    options = parser.parse_args(arguments)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(name)s %(levelname)s %(message)s")
    if rank:
        # These end when rank 0 has left: it may still need them for what drains.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    try:
        settings = _settings(options, size)
        _prepare_device(size)
        return serve(settings, Tokens.of_environment())
    except BdloraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        # A lost rank would never come to a common end.
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _settings(options: argparse.Namespace, size: int) -> ServeSettings:
    if options.settings is not None:
        settings = ServeSettings.model_validate_json(options.settings)
    else:
        settings = ServeSettings.of(options.config, {})
    if "tp" in settings.model_fields_set and settings.tp != size:
        raise ConfigError(
            "tp", found=str(settings.tp), expected=f"{size}, the processes that were started", remedy="leave it out"
        )
    return settings


def _prepare_device(size: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        # Ranks of one machine share its cores.
        torch.set_num_threads(max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))
    if size > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that waits in a collective for a lost rank would keep the process alive.
    os._exit(status)
