"""What `test_ray_serve` runs: two replicas, four adapters, every answer compared with PEFT's."""

import socket
import sys
from pathlib import Path

import httpx
import ray
import torch
from ray import serve
from ray_serve.replicas import start

from tests.models import AdapterSpec, Reference, save_adapter, save_model
from tests.serving.conftest import SPEC, tokenizer_of

NAMES = ("a", "b", "c", "d")


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
    start(model, folder / "roots", 2, port)
    prompt = torch.tensor([[5]])
    homes: dict[str, set[str]] = {}
    for name in [*NAMES, "", *NAMES, *NAMES, ""]:
        headers = {"serve_multiplexed_model_id": name} if name else {}
        answer = httpx.post(
            f"http://127.0.0.1:{port}/", json={"prompt": "<5>", "max_tokens": 4}, headers=headers, timeout=60
        )
        found = answer.raise_for_status().json()
        tokens = reference.generate(prompt, [name or None], torch.ones_like(prompt), 4)[0].tolist()
        expected = "".join(f"<{token}>" for token in tokens[: tokens.index(2) if 2 in tokens else 4] if token > 2)
        assert found["text"] == expected, (name, found, expected)
        homes.setdefault(name, set()).add(found["replica"])
    # Which replica has which adapter is Ray's choice; a replica that has it is asked again.
    assert all(len(homes[name]) == 1 for name in NAMES), homes
    print("requests followed their adapters")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
