"""Replicas of one model under Ray Serve; a request goes to a replica that holds its adapter.

    pip install 'bdlora-compile[serve,ray]'
    python examples/ray_serve/replicas.py MODEL --adapter-root /srv/adapters --replicas 2 --port 8000

Each replica is one tensor-parallel group: its engine lives in the replica's process (one rank, as here) or behind
``bdlora serve`` on the replica's GPUs. Ray's multiplexing keeps at most ``max_adapters`` adapters in a replica, loads
one when a request for it comes, forgets the one unused for longest, and sends requests to replicas that have theirs. A
request names its adapter in the header ``serve_multiplexed_model_id``; without it the base model answers.
"""

import argparse
from pathlib import Path
from typing import Any

from ray import serve
from starlette.requests import Request as HttpRequest

MAX_ADAPTERS = 4
"""Adapters that a replica holds at once."""


@serve.deployment(max_ongoing_requests=64)
class Replica:
    """One engine. Ray makes as many as it is told to.

    Args:
        model: a Hugging Face folder.
        adapter_root: folder of adapters; a request's adapter is looked up there and nowhere else.
    """

    def __init__(self, model: str, adapter_root: str) -> None:
        from transformers import AutoTokenizer  # in the replica's process, not in the driver's

        import bdlora_compile as bd
        from bdlora_compile.serving.engine import Engine

        self._roots = bd.AdapterRoots(adapter_root)
        served, adapters = bd.load(model, max_adapters=MAX_ADAPTERS, max_rank=16)
        served.compile(backend="bdlora")
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._engine = Engine(served, adapters, self._tokenizer, max_rows=8, max_length=256)
        self._engine.start()

    @serve.multiplexed(max_num_models_per_replica=MAX_ADAPTERS)
    async def adapter(self, name: str) -> "Loaded":
        """Load an adapter by name; Ray calls this when the replica does not have it yet."""
        import asyncio

        await asyncio.to_thread(self._engine.load_adapter, name, self._roots.find(name))
        return Loaded(self._engine, name)

    async def __call__(self, http: HttpRequest) -> dict[str, Any]:
        """Complete ``prompt``; says which replica did."""
        from bdlora_compile.serving.requests import Finished, Request, SamplingParams, Token

        body = await http.json()
        name = serve.get_multiplexed_model_id() or None
        if name is not None:
            await self.adapter(name)
        prompt = tuple(self._tokenizer(body["prompt"])["input_ids"])
        sampling = SamplingParams(max_tokens=int(body.get("max_tokens", 16)), temperature=0)
        text, reason = "", "error"
        with self._engine.submit(Request(prompt, name, sampling)) as stream:
            async for event in stream:
                if isinstance(event, Token):
                    text += event.text
                elif isinstance(event, Finished):
                    reason = event.reason
        replica = serve.get_replica_context().replica_id.unique_id
        return {"text": text, "finish_reason": reason, "adapter": name, "replica": replica}

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has failed."""
        if self._engine.failed is not None:
            raise self._engine.failed


class Loaded:
    """What Ray keeps of an adapter; when Ray lets go of it, the replica forgets the adapter.

    Args:
        engine: of the replica.
        name: of the adapter.
    """

    def __init__(self, engine: Any, name: str) -> None:
        self._engine = engine
        self._name = name

    def __del__(self) -> None:
        self._engine.unload_adapter(self._name)


def start(model: Path, adapter_root: Path, replicas: int, port: int) -> None:
    """Serve on this machine's Ray, or on the cluster that it is part of."""
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 0}}
    deployment: Any = Replica  # the decorator's type is that of the class it replaces
    serve.run(deployment.options(**options).bind(str(model), str(adapter_root)))


def main() -> None:
    """Read the command line and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter-root", type=Path, required=True)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    start(options.model, options.adapter_root, options.replicas, options.port)
    input("serving; press enter to end\n")
    serve.shutdown()


if __name__ == "__main__":
    main()
