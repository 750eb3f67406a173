"""What `test_ray_serve` runs: two replicas, four adapters, OpenAI's client, every answer compared with PEFT's."""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import ray
import torch
from ray import serve
from ray_serve.replicas import BASE, start

from tests.models import AdapterSpec, Reference, save_adapter, save_model
from tests.serving.conftest import SPEC, tokenizer_of

NAMES = ("a", "b", "c", "d")
TOKENS = 4
PROMPT = 5


def main(folder: Path) -> None:
    """Make a model, start, ask, compare."""
    model = save_model(SPEC, folder / "model")
    tokenizer_of(SPEC.vocabulary).save_pretrained(model)
    paths = {
        name: save_adapter(AdapterSpec(rank=4), model, folder / "roots" / name, seed) for seed, name in enumerate(NAMES)
    }
    reference = Reference(model, paths, torch.float32)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    start(model, folder / "roots", 2, 1, port, ["--max-rank", "4", "--max-length", "64"])
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=60)
    homes: dict[str, set[str]] = {}
    for name in [*NAMES, BASE, *NAMES, *NAMES, BASE]:
        home, text = ask(client, name)
        assert text == expected(reference, None if name == BASE else name), (name, text)
        homes.setdefault(name, set()).add(home)
    # Which replica has which adapter is Ray's choice; a replica that has it is asked again.
    assert all(len(homes[name]) == 1 for name in NAMES), homes
    for name in ("nobody", "../a"):
        try:
            ask(client, name)
        except openai.NotFoundError:
            continue
        raise AssertionError(f"{name} was answered")
    print("requests followed their adapters")
    lose_a_group()
    assert [ask(client, name)[1] for name in NAMES] == [expected(reference, name) for name in NAMES]
    print("a lost group was replaced")
    serve.shutdown()
    ray.shutdown()


def ranks() -> set[int]:
    """Process ids of the ranks of all groups."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if "bdlora_compile.serving.http.server" in child.cmdline():
                found.add(child.pid)
    return found


def lose_a_group() -> None:
    """Kill a rank, and wait until there are two groups again."""
    before = ranks()
    assert len(before) == 2, before
    lost = min(before)
    os.kill(lost, signal.SIGKILL)
    deadline = time.monotonic() + 150
    while len(now := ranks() - {lost}) < 2 or not is_running():
        assert time.monotonic() < deadline, now
        time.sleep(1)


def is_running() -> bool:
    """Whether Ray calls all replicas healthy."""
    deployments = serve.status().applications["default"].deployments.values()
    return all(str(deployment.status) == "DeploymentStatus.HEALTHY" for deployment in deployments)


def ask(client: openai.OpenAI, name: str) -> tuple[str, str]:
    """The replica that answered, and the whole text of a streamed answer."""
    asked: dict[str, Any] = {"model": name, "prompt": [PROMPT], "max_tokens": TOKENS, "temperature": 0, "stream": True}
    answer = client.completions.with_raw_response.create(**asked, extra_body={"ignore_eos": True})
    text = "".join(chunk.choices[0].text for chunk in answer.parse())
    return answer.headers["x-replica"], text


def expected(reference: Reference, name: str | None) -> str:
    """PEFT's greedy text; special tokens have none."""
    ids = torch.tensor([[PROMPT]])
    tokens = reference.generate(ids, [name], torch.ones_like(ids), TOKENS)[0].tolist()
    return "".join(f"<{token}>" for token in tokens if token > 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
