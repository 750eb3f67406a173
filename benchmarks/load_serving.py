"""Many streaming clients on one server: adapters by Zipf's law, clients that hang up; every token checked against PEFT.

    python benchmarks/load_serving.py                             64 clients, 20 adapters, 3 minutes
    python benchmarks/load_serving.py --seconds 10 --clients 16

A tiny random model on one rank, the real engine, the real routes, uvicorn; 20 adapters known, room for 6 of them.
The reference is PEFT's eager model, one row at a time, float64. A client asks for a prompt of a fixed list and an
adapter; a fifth hang up after a random number of events, some ask for what must be refused. At the end nothing may be
left: rows, references to adapters, tasks of the event loop; and memory must not have grown since the first third.
Exit status 1 if anything was wrong.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import BdLoraConfig
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import bdlora_compile as bd
from bdlora_compile.backend import bdlora
from bdlora_compile.serving.engine import Engine
from bdlora_compile.serving.http.app import build
from bdlora_compile.serving.http.server import service_of
from bdlora_compile.serving.http.settings import ServeSettings, Tokens

VOCABULARY = 128
TOKENS = 12
PROMPTS = [[5], [5, 9], [7, 7, 7, 9, 100, 4], list(range(3, 43))]
COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
GROWTH_MB = 40
"""Allowed between the first third and the end. The allocator's own noise was 15 in three minutes."""


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        ends: of requests, by kind.
        wrong: descriptions of answers that were not as they must be.
        first_token: seconds to the first event of each request.
        tokens: events with text.
    """

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    tokens: int = 0


def make(folder: Path, num_adapters: int) -> dict[str, Path]:
    """A random model and random adapters, ordinary and block-diagonal, written by transformers and PEFT."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(folder / "model")
    paths = {}
    for index in range(num_adapters):
        blocks = BdLoraConfig(target_modules_bd_a=ROW, target_modules_bd_b=COLUMN, nblocks=2) if index % 2 else None
        settings = LoraConfig(r=4, lora_alpha=12, target_modules=COLUMN + ROW, use_bdlora=blocks)
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), settings)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        paths[f"adapter-{index}"] = folder / f"adapter-{index}"
        tuned.save_pretrained(paths[f"adapter-{index}"])
    return paths


@torch.no_grad()
def references(folder: Path, paths: dict[str, Path]) -> dict[tuple[str, int], str]:
    """Greedy text of each adapter and prompt by PEFT's eager model, without a cache."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    model: Any = base
    for name, path in paths.items():
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model = PeftModel.from_pretrained(base, path, adapter_name=name, autocast_adapter_dtype=False)
    model.to(torch.float64)
    known = {}
    for name in ["base", *paths]:
        for index, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            if name == "base":
                with model.disable_adapter():
                    tokens = _greedy(model, ids)
            else:
                model.set_adapter(name)
                tokens = _greedy(model, ids)
            known[name, index] = "".join(f"<{token}>" for token in tokens if token > 2)
    return known


def _greedy(model: Any, ids: torch.Tensor) -> list[int]:
    start = ids.shape[1]
    for _ in range(TOKENS):
        following = model(ids, use_cache=False).logits[0, -1].argmax().view(1, 1)
        ids = torch.cat([ids, following], dim=1)
    found: list[int] = ids[0, start:].tolist()
    return found


def tokenizer() -> Any:
    """Token i is the text "<i>"; the first three are special."""
    words = {"[pad]": 0, "[bos]": 1, "[eos]": 2} | {f"<{index}>": index for index in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[pad]", bos_token="[bos]", eos_token="[eos]")


class Client:
    """Asks again and again until time is over."""

    def __init__(self, http: httpx.AsyncClient, known: dict[tuple[str, int], str], tally: Tally, seed: int) -> None:
        self._http = http
        self._known = known
        self._tally = tally
        self._random = random.Random(seed)
        self._names = sorted({name for name, _ in known})
        self._weights = [1 / (rank + 1) for rank in range(len(self._names))]

    async def run(self, deadline: float) -> None:
        """One request after the other."""
        while time.monotonic() < deadline:
            if self._random.random() < 0.03:
                await self._bad()
            else:
                await self._good()

    async def _bad(self) -> None:
        body, expected = self._random.choice(
            [
                ({"model": "nobody", "prompt": [5]}, 404),
                ({"model": "base", "prompt": [5], "echo": True}, 400),
                ({"model": "base", "prompt": [5] * 500}, 400),
                ({"model": "base", "prompt": [VOCABULARY]}, 400),
            ]
        )
        answer = await self._http.post("/v1/completions", json=body)
        self._tally.ends[f"refused {answer.status_code}"] += 1
        if answer.status_code != expected or "message" not in answer.json()["error"]:
            self._tally.wrong.append(f"{body}: {answer.status_code} {answer.text:.200}")

    async def _good(self) -> None:
        name = self._random.choices(self._names, self._weights)[0]
        index = self._random.randrange(len(PROMPTS))
        body = {"model": name, "prompt": PROMPTS[index], "max_tokens": TOKENS, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True}
        patience = self._random.randrange(TOKENS) if self._random.random() < 0.2 else None
        start, text, is_done = time.monotonic(), "", False
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                self._tally.ends["refused 429"] += 1
                await answer.aread()
                await asyncio.sleep(self._random.random() * float(answer.headers["Retry-After"]))
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    if not text:
                        self._tally.first_token.append(time.monotonic() - start)
                    event = json.loads(line[6:])
                    if "error" in event:
                        self._tally.wrong.append(f"{name}: {event}")
                        return
                    self._tally.tokens += 1
                    text += event["choices"][0]["text"]
                is_done = is_done or line == "data: [DONE]"
                if patience is not None and text.count("<") > patience:
                    self._tally.ends["hung up"] += 1
                    break
        expected = self._known[name, index]
        if not expected.startswith(text) or (patience is None and (text != expected or not is_done)):
            self._tally.wrong.append(f"{name}, prompt {index}: {text} instead of {expected}")
        if is_done:
            self._tally.ends["answered"] += 1


async def load(url: str, known: dict[tuple[str, int], str], clients: int, seconds: float) -> tuple[Tally, list[float]]:
    """All clients; and the memory of the process in MB, measured once a second."""
    tally, memory = Tally(), []
    deadline = time.monotonic() + seconds

    async def watch() -> None:
        while time.monotonic() < deadline:
            memory.append(_resident_mb())
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        runs = [Client(http, known, tally, seed).run(deadline) for seed in range(clients)]
        await asyncio.gather(watch(), *runs)
    return tally, memory


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    """Make, load, look what is left, say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = make(folder, options.adapters)
        known = references(folder, paths)
        model, adapters = bd.load(folder / "model", paths, dtype=torch.float64, max_adapters=6, max_rank=4)
        model.compile(backend=bdlora)
        with Engine(model, adapters, tokenizer(), max_rows=8, max_length=64, max_waiting=48) as engine:
            settings = ServeSettings(model="unused", served_name="base", max_length=64)
            app = build(service_of(engine, adapters, tokenizer(), settings, Tokens()))
            return _serve_and_load(app, engine, adapters, known, options)


def _serve_and_load(app: Any, engine: Engine, adapters: Any, known: Any, options: argparse.Namespace) -> int:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    tasks: list[int] = []

    async def serve() -> None:
        await server.serve()
        # uvicorn's own task is this one.
        tasks.append(len(asyncio.all_tasks()) - 1)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    tally, memory = asyncio.run(load(f"http://127.0.0.1:{port}", known, options.clients, options.seconds))
    deadline = time.monotonic() + 10
    while engine.stats().rows_in_use and time.monotonic() < deadline:
        time.sleep(0.05)
    stats = engine.stats()
    server.should_exit = True
    thread.join(20)
    gc.collect()
    references_held = sum(adapters[name].references for name in adapters.names)
    left = {
        "rows": stats.rows_in_use,
        "waiting": sum(stats.waiting.values()),
        "cache tokens": stats.cache_tokens,
        "references to adapters": references_held,
        "tasks": tasks[0] if tasks else "the server did not end",
    }
    return _report(options, tally, memory, left, stats)


def _report(options: argparse.Namespace, tally: Tally, memory: list[float], left: dict[str, Any], stats: Any) -> int:
    early = max(memory[: max(len(memory) // 3, 1)])
    growth = max(memory[-max(len(memory) // 3, 1) :]) - early
    first = sorted(tally.first_token) or [0.0]
    print(f"{options.clients} clients, {options.adapters} adapters, {options.seconds:g} s")
    print(f"requests: {dict(sorted(tally.ends.items()))}")
    print(f"tokens: {tally.tokens}, {tally.tokens / options.seconds:.0f} a second; decode steps: {stats.decode_steps}")
    print(f"first token: median {first[len(first) // 2]:.2f} s, 99 % below {first[int(len(first) * 0.99)]:.2f} s")
    print(f"memory: {early:.0f} MB at most in the first third, {growth:+.0f} MB in the last")
    print(f"left at the end: {left}")
    for line in tally.wrong[:10]:
        print(f"WRONG: {line}")
    is_good = not tally.wrong and not any(left.values()) and growth < GROWTH_MB and tally.ends["answered"] > 0
    print("all answers equal PEFT's, nothing is left" if is_good else "FAILED")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
