"""Load and run rank 0 of 8 of a model of 8B parameters from a sparse file; print the anonymous memory that it took.

The fake process group stands for the other ranks: collectives return at once. The weights are zeros that take no disk.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

import bdlora_compile as bd
from benchmarks.decode.files import write_sparse_model

RANKS = 8
CONFIG = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The largest anonymous memory seen while it runs, sampled every 20 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.02)


def main(folder: Path) -> None:
    """Print one line of JSON: bytes before, at the peak, and of this rank's shards and adapter pool."""
    write_sparse_model(CONFIG, folder)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    before = anonymous_bytes()
    with Peak() as peak, torch.no_grad():
        model, _ = bd.load(folder, max_adapters=4, max_rank=16)
        model.compile(backend="bdlora", options={"inner": "eager"})
        cache = bd.make_cache(model, 2, 64)
        model(torch.ones(2, 4, dtype=torch.int64), past_key_values=cache)
    state = model.bdlora.ranks[0]
    own = state.store.num_bytes() + state.bank.pool.nbytes + cache.store.nbytes
    whole = sum(parameter.numel() for parameter in model.parameters()) * 2
    print(json.dumps({"before": before, "peak": peak.bytes, "own": own, "whole": whole}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
