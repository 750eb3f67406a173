"""Count the bytes of collectives while they run, and compare them with the report's; run by torchrun with gloo.

The counting knows nothing of our graphs: a dispatch mode sees every collective that reaches PyTorch's dispatcher, with
the tensors that it is given and the tensor that it returns.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.utils._python_dispatch import TorchDispatchMode

import bdlora_compile as bd
from bdlora_compile.census import Census, number_of
from bdlora_compile.runtime.agreement import SETUP_TIMEOUT, StoreAgreement
from bdlora_compile.runtime.program import Program
from bdlora_compile.strategy import Strategy
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

BATCH, PROMPT = 3, 5


class CollectiveBytes(TorchDispatchMode):
    """Bytes of the collectives that run inside: (kind, bytes of the operand, bytes of the result), how often."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace == "_c10d_functional" and not name.startswith("wait"):
            self.seen[name.split(".")[0], args[0].nbytes, result.nbytes] += 1
        return result


@contextmanager
def counted() -> Iterator[CollectiveBytes]:
    """Count what compiled forwards inside the block run (Dynamo skips calls that it sees under a mode)."""
    mode, intact = CollectiveBytes(), Program.__call__

    def call(program: Program, *args: Any) -> Any:
        with mode:
            return intact(program, *args)

    Program.__call__ = call  # type: ignore[assignment, method-assign]  # put back below
    try:
        yield mode
    finally:
        Program.__call__ = intact  # type: ignore[method-assign]  # as it was


def differences(census: Census, seen: Counter[tuple[str, int, int]], seq: int) -> list[str]:
    """Where the report's collectives and those that ran differ; empty if they are the same."""
    told: Counter[tuple[str, int, int]] = Counter()
    for one in census.collectives:
        payload = number_of(one.payload_bytes, BATCH, seq)
        gathers = one.kind == "all_gather_into_tensor"
        told[one.kind, payload // one.group_size if gathers else payload, payload] += one.runs
    only_told = [f"reported, did not run: {one}" for one in (told - seen).elements()]
    return only_told + [f"ran, not reported: {one}" for one in (seen - told).elements()]


def sabotaged(census: Census) -> list[Census]:
    """Reports that are wrong: a collective is missing, is one column wider, or runs in one layer less."""
    first, *rest = census.collectives
    layered = next(one for one in rest if one.layers)
    others = [one for one in census.collectives if one is not layered]
    return [
        Census(rest),
        Census([replace(first, shape=(*first.shape[:-1], first.shape[-1] + 1)), *rest]),
        Census([replace(layered, layers=layered.layers[1:]), *others]),
    ]


def check_bytes(folder: Path, strategy: Strategy, rows: Sequence[str | None]) -> str:
    """Prompt and one more token, with and without adapters: each forward's bytes are those of its report."""
    torch._dynamo.reset()
    model, adapters = bd.load(
        folder / "model", {"blocks": folder / "blocks", "plain": folder / "plain"}, strategy=strategy
    )
    model.compile(backend="bdlora", options={"inner": "eager"})
    total = 0
    for chosen in (rows, [None] * BATCH):
        cache = bd.make_cache(model, BATCH, 64)
        for number, seq in enumerate((PROMPT, 1)):
            with counted() as mode, adapters.use(chosen), torch.no_grad():
                model(torch.ones(BATCH, seq, dtype=torch.int64), past_key_values=cache)
            report = bd.reports(model)[number]
            census = (report.stages if any(chosen) else report.base_only)[-1].census
            assert mode.seen, "nothing was counted"
            assert not (found := differences(census, mode.seen, seq)), f"{strategy}, {seq} tokens: {found}"
            for altered in sabotaged(census):
                assert differences(altered, mode.seen, seq), "an altered report went unnoticed"
            total += sum(count * result for (_, _, result), count in mode.seen.items())
    return f"{strategy}: {total} bytes on {dist.get_world_size()} ranks"


def main() -> int:
    """Both layouts; fewer kv heads than ranks."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=200))
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        spec = ModelSpec(heads=max(4, size), kv_heads=size // 2, layers=3, intermediate=48, vocabulary=131)
        save_model(spec, folder / "model")
        save_adapter(AdapterSpec(rank=8, nblocks=4), folder / "model", folder / "blocks")
        save_adapter(AdapterSpec(rank=5), folder / "model", folder / "plain")
    store = dist.distributed_c10d._get_default_store()
    StoreAgreement(PrefixStore("prepared", store), rank, size, SETUP_TIMEOUT).exchange("files", "")
    strategies: tuple[Strategy, ...] = ("local", "slora")
    for strategy in strategies:
        line = check_bytes(folder, strategy, ["blocks", None, "plain"])
        if rank == 0:
            print(f"case: {line}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
