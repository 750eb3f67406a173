"""Replicas of one model under Ray Serve; a request goes to a replica that has its adapter.

    pip install 'bdlora-compile[serve,ray]'
    python examples/ray_serve/replicas.py MODEL --adapter-root /srv/adapters --replicas 4 --tp 2 --port 8000
    curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"model": "law", "prompt": "Once"}'

A replica is a tensor-parallel group: ``bdlora serve`` on GPUs of its own, with its protocol, queues and errors. Before
the replicas stands a router, which reads the model's name in a request and lets Ray choose (model multiplexing): a
replica that has the adapter, one that is less busy otherwise. A replica that is asked for an adapter for the first time
loads it from the adapter root. It is not unloaded: `bdlora serve` by itself moves adapters that nobody uses to host
memory.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

BASE = "base"
"""Name of the model without an adapter."""

MAX_ADAPTERS = 16
"""Adapters that Ray expects in one replica at most; as many lie on its GPUs at once."""


class Refused(Exception):
    """An adapter that the server does not load; what it says to requests for it is the better answer."""


@serve.deployment(max_ongoing_requests=64)
class Replica:
    """One group of ranks.

    Args:
        model: a Hugging Face folder.
        adapter_root: where adapters are, by name.
        tp: ranks.
        flags: more of ``bdlora serve``.
    """

    def __init__(self, model: str, adapter_root: str, tp: int, flags: list[str]) -> None:
        token = secrets.token_hex(24)
        command = [sys.executable, "-m", "bdlora_compile", "serve", model, "--tp", str(tp), "--served-name", BASE]
        command += ["--adapter-root", adapter_root, "--max-adapters", str(MAX_ADAPTERS), "--port", "0", *flags]
        self._server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"BDLORA_ADMIN_TOKEN": token}
        )
        assert self._server.stdout is not None, "it is a pipe"
        said = next((line for line in self._server.stdout if line.startswith("serving")), None)
        if said is None:
            raise RuntimeError(f"bdlora serve ended with status {self._server.wait()}; the replica's log says why")
        self._http = httpx.AsyncClient(base_url=said.split()[-1], timeout=None)
        self._admin = {"Authorization": f"Bearer {token}"}
        self._name = serve.get_replica_context().replica_id.unique_id

    @serve.multiplexed(max_num_models_per_replica=MAX_ADAPTERS)
    async def adapter(self, name: str) -> str:
        """Load an adapter; Ray calls this where it has not seen the name, and remembers the replica by it."""
        asked = {"lora_name": name, "lora_path": name}
        answer = await self._http.post("/v1/load_lora_adapter", json=asked, headers=self._admin)
        if answer.is_error and answer.json()["error"]["code"] != "already_loaded":
            raise Refused(name)
        return name

    async def answer(self, path: str, body: bytes) -> AsyncIterator[Any]:
        """(status, headers) of the server's answer, then its bytes as they come."""
        if name := serve.get_multiplexed_model_id():
            with suppress(Refused):
                await self.adapter(name)
        headers = {"Content-Type": "application/json"}
        # Closed when the client hangs up: then the server cancels the request.
        async with self._http.stream("POST", path, content=body, headers=headers) as answer:
            yield answer.status_code, {"Content-Type": answer.headers["Content-Type"], "X-Replica": self._name}
            async for part in answer.aiter_raw():
                yield part

    async def check_health(self) -> None:
        """Ray replaces a replica whose group has failed: `bdlora serve` ends all its processes then."""
        (await self._http.get("/health", timeout=30)).raise_for_status()

    def __del__(self) -> None:
        self._server.terminate()
        self._server.wait()


@serve.deployment(max_ongoing_requests=1000)
class Router:
    """The only one that clients see.

    Args:
        replicas: Ray's handle of them.
    """

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, http: Request) -> Response:
        """Pass a request on to a replica, and its answer back."""
        if http.url.path not in ("/v1/completions", "/v1/chat/completions"):
            return Response(status_code=404)
        body = await http.body()
        replica = self._replicas.options(multiplexed_model_id=adapter_of(body))
        parts = replica.answer.remote(http.url.path, body)
        status, headers = await anext(parts)
        return StreamingResponse(parts, status, headers)


def adapter_of(body: bytes) -> str:
    """The adapter that a request names; "" for the base model, and where the server will say what is wrong."""
    try:
        name = json.loads(body)["model"]
    except (ValueError, LookupError, TypeError):
        return ""
    return name if isinstance(name, str) and name != BASE else ""


def start(model: Path, adapter_root: Path, replicas: int, tp: int, port: int, flags: list[str]) -> None:
    """Serve on this machine's Ray, or on the cluster that it is part of."""
    import torch  # how many GPUs there are, nothing else

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    gpus = tp if torch.cuda.is_available() else 0
    groups: Any = Replica  # the decorator's type is that of the class it replaces
    groups = groups.options(num_replicas=replicas, ray_actor_options={"num_cpus": 0, "num_gpus": gpus})
    router: Any = Router
    serve.run(router.bind(groups.bind(str(model), str(adapter_root), tp, flags)))


def main() -> None:
    """Read the command line and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter-root", type=Path, required=True)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1, help="ranks of a replica, on as many GPUs")
    parser.add_argument("--port", type=int, default=8000)
    options, flags = parser.parse_known_args()
    start(options.model, options.adapter_root, options.replicas, options.tp, options.port, flags)
    input("serving; press enter to end\n")
    serve.shutdown()


if __name__ == "__main__":
    main()
