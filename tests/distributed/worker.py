"""One rank of a real launch: many cases in one start, since starting processes and compiling cost most of the time.

Run by torchrun, from the tests with gloo and by hand with NCCL:

    torchrun --standalone --nproc-per-node 2 -m tests.distributed.worker FOLDER --inner inductor --dtype bfloat16
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

import bdlora_compile as bd
from bdlora_compile.ir import Origin
from bdlora_compile.placement import Mesh
from bdlora_compile.runtime.agreement import SETUP_TIMEOUT, StoreAgreement, require_equal
from bdlora_compile.strategy import Strategy
from tests.models import AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

SPECS = {
    "blocks": AdapterSpec(rank=8, nblocks=4),
    "plain": AdapterSpec(rank=6),
    "stable": AdapterSpec(rank=4, nblocks=2, options={"use_rslora": True}),
}
ROWS = ["blocks", None, "plain", "stable"]
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def prepare(folder: Path, spec: ModelSpec) -> None:
    """Rank 0 writes the model and its adapters."""
    save_model(spec, folder / "model")
    for seed, (name, adapter) in enumerate(SPECS.items()):
        save_adapter(adapter, folder / "model", folder / name, seed)


def check_logits(folder: Path, strategy: Strategy, options: argparse.Namespace) -> str:
    """Compiled logits on all ranks against PEFT in float64."""
    dtype = getattr(torch, options.dtype)
    torch._dynamo.reset()
    paths = {name: folder / name for name in SPECS}
    start = time.perf_counter()
    model, adapters = bd.load(folder / "model", paths, dtype=dtype, strategy=strategy)
    # Reports cost time that the larger runs have no use for.
    reports = {"report": folder / "reports"} if options.only_local else {}
    model.compile(backend="bdlora", options={"inner": options.inner, **reports})
    device = model.bdlora.plan.device
    torch.manual_seed(7)
    ids = torch.randint(3, 120, (4, 12)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with adapters.use(ROWS), torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        torch.manual_seed(dist.get_rank())
        sampled = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=True)
    # What was recorded here would keep NCCL from ending.
    bd.release_graphs(model)
    require_equal(model.bdlora.agreement, "sampled tokens", str(sampled.tolist()))
    require_equal(model.bdlora.agreement, "greedy tokens", str(tokens.tolist()))
    seconds = time.perf_counter() - start
    exact = Reference(folder / "model", paths, torch.float64).logits(ids.cpu(), ROWS, mask.cpu())
    reference = Reference(folder / "model", paths, dtype)
    keep = mask.bool().cpu()
    error = relative_error(found.cpu()[keep], exact[keep])
    census = bd.reports(model)[-1].stages[-1].census
    # Rounding is amplified by the random layers: PEFT's own eager error in this dtype is the measure. The floor is one
    # rounding more, since sums of ranks' parts are rounded in another order.
    own = relative_error(reference.logits(ids.cpu(), ROWS, mask.cpu())[keep], exact[keep])
    tolerance = 2 * own + FLOORS[dtype]
    assert error < tolerance, f"{strategy}: relative error {error:.2e}, allowed {tolerance:.2e}"
    lora = census.per_layer(Origin.LORA)
    assert set(lora) == {4 if strategy == "slora" else 0}, f"{strategy}: LoRA collectives per layer {lora}"
    if dtype is torch.float32:
        greedy = reference.generate(ids.cpu(), ROWS, mask.cpu(), 8)
        assert torch.equal(tokens[:, 12:].cpu(), greedy), f"{strategy}: greedy tokens differ from PEFT's"
    counts = f"LoRA collectives {census.total(Origin.LORA)}"
    return f"{strategy}: relative error {error:.2e} (allowed {tolerance:.1e}), {counts}, {seconds:.0f} s"


def check_sabotage(folder: Path, options: argparse.Namespace) -> str:
    """Without the collectives the same comparison must fail."""
    library = torch.ops._c10d_functional
    from bdlora_compile import collectives

    def broken(graph: torch.fx.Graph, value: torch.fx.Node, mesh: Mesh) -> tuple[torch.fx.Node, ...]:
        return (graph.call_function(library.wait_tensor.default, (value,)),)

    intact = collectives.all_reduce
    collectives.all_reduce = broken  # type: ignore[assignment]  # sabotage
    try:
        check_logits(folder, "local", options)
    except (AssertionError, bd.AgreementError) as error:
        return f"sabotage noticed: {str(error)[:80]}"
    finally:
        collectives.all_reduce = intact
    raise AssertionError("deleting the all-reduces went unnoticed")


def check_mismatch(folder: Path, options: argparse.Namespace) -> str:
    """A rank with other collectives, and a rank that never answers, are reported within the time limit."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = PrefixStore("mismatch", dist.distributed_c10d._get_default_store())
    agreement = StoreAgreement(store, rank, size, timedelta(seconds=60))
    try:
        require_equal(agreement, "collectives", "all_reduce\n" + ("all_gather" if rank else "all_reduce"))
    except bd.AgreementError as error:
        assert "line 2" in str(error), str(error)
    else:
        raise AssertionError("different collectives went unnoticed")
    late = StoreAgreement(PrefixStore("late", store), rank, size, timedelta(seconds=2))
    if rank == 0:
        start = time.perf_counter()
        try:
            late.exchange("never", "")
        except bd.AgreementError as error:
            assert time.perf_counter() - start < 20, "the time limit was not kept"
            assert "rank 1" in str(error), str(error)
        else:
            raise AssertionError("a missing rank went unnoticed")
    return "mismatch and absence reported"


def check_load(folder: Path, options: argparse.Namespace) -> str:
    """An adapter that one rank cannot read, or of which it has other contents, is loaded by none."""
    _, adapters = bd.load(folder / "model", {"plain": folder / "plain"}, max_rank=16)
    own = shutil.copytree(folder / "blocks", folder / f"own-{dist.get_rank()}")
    weights = own / "adapter_model.safetensors"
    whole = weights.read_bytes()
    is_last = dist.get_rank() == dist.get_world_size() - 1
    for damaged in (whole[:-8], whole[:100], whole[:-1] + bytes([whole[-1] ^ 1]), None):
        if is_last and damaged is None:
            shutil.rmtree(own)
        elif is_last and damaged is not None:
            weights.write_bytes(damaged)
        try:
            adapters.load("blocks", own)
        except (bd.AdapterError, bd.AgreementError) as error:
            assert adapters.names == ("plain",), adapters.names
            assert is_last or f"rank {dist.get_world_size() - 1}" in str(error), str(error)
        else:
            raise AssertionError("half a load went unnoticed")
    adapters.load("blocks", folder / "blocks")
    return f"all or none: {adapters.names}"


def main() -> int:
    """Run all cases; rank 0 prints a line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--large", action="store_true", help="a model of SmolLM2's size instead of a tiny one")
    parser.add_argument("--only-local", action="store_true", help="the first case alone")
    options = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timedelta(seconds=240))
    large = ModelSpec(16, 4, 64, 4, 2048, 16384)
    if dist.get_rank() == 0:
        prepare(options.folder, large if options.large else ModelSpec(vocabulary=131))
    StoreAgreement(
        PrefixStore("prepared", dist.distributed_c10d._get_default_store()),
        dist.get_rank(),
        dist.get_world_size(),
        SETUP_TIMEOUT,
    ).exchange("files", "")
    cases: list[Callable[[], str]] = [
        lambda: check_logits(options.folder, "local", options),
        lambda: check_logits(options.folder, "slora", options),
        lambda: check_sabotage(options.folder, options),
        lambda: check_load(options.folder, options),
        lambda: check_mismatch(options.folder, options),
    ]
    for case in cases[:1] if options.only_local else cases:
        line = case()
        if dist.get_rank() == 0:
            print(f"case: {line}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
