"""One rank of a real launch over models that others sharded; many cases in one start.

torchrun --standalone --nproc-per-node 2 -m tests.foreign.worker FOLDER --inner inductor
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from slora_blocks import ModuleBlock, Whole, functional_block
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import bdlora_compile as bd
from bdlora_compile.ir import Origin
from bdlora_compile.report import Report
from bdlora_compile.runtime import foreign_program
from tests.models import AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

TOLERANCE = 1e-12
"""Blocks are float64 throughout."""

MODEL_TOLERANCE = 2e-6
"""transformers' norms and rotary angles are float32 in a float64 model."""


def compiled(model: Callable[..., Any], options: argparse.Namespace) -> tuple[Any, list[Report]]:
    """The model compiled by the backend, and where its reports will be."""
    torch._dynamo.reset()
    reports: list[Report] = []
    settings = {"inner": options.inner, "on_report": reports.append}
    return torch.compile(model, backend="bdlora", options=settings, fullgraph=True), reports


def whole(device: torch.device) -> Whole:
    torch.manual_seed(0)
    made = Whole.random(width=16, inner=48, rank=24, nblocks=2 * dist.get_world_size())
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(made).items() if isinstance(value, Tensor)
    }
    return replace(made, **tensors)


def check_blocks(options: argparse.Namespace) -> str:
    """Two hand-written styles lose both LoRA collectives and stay equal to the dense block, for several lengths."""
    weights = whole(options.device)
    errors = []
    for build in (ModuleBlock, functional_block):
        block, reports = compiled(build(weights), options)
        for length in (5, 1, 9):
            x = torch.randn(3, length, 16, dtype=torch.float64).to(options.device)
            dist.broadcast(x, 0)
            with torch.no_grad():
                errors.append(relative_error(block(x), weights.reference(x)))
        assert all(report.stages[-1].census.total(Origin.LORA) == 0 for report in reports)
        assert all(report.stage("tag paths").census.total(Origin.LORA) == 2 for report in reports)
    assert max(errors) < TOLERANCE, f"relative error {max(errors):.1e}"
    return f"two hand-written blocks: relative error {max(errors):.1e}"


def check_writes(options: argparse.Namespace) -> str:
    """A write to a factor after compiling, or a factor put in place of another, raises instead of answering wrongly."""
    weights = whole(options.device)
    x = torch.ones(2, 4, 16, dtype=torch.float64, device=options.device)

    def load(block: ModuleBlock) -> None:
        block.load_state_dict({name: value.clone() for name, value in block.state_dict().items()})

    def write(block: ModuleBlock) -> None:
        block.down.lora_b.mul_(2.0)

    def put_another(block: ModuleBlock) -> None:
        block.up.lora_b = torch.nn.Parameter(block.up.lora_b.clone(), requires_grad=False)

    for change in (write, load, put_another):
        block = ModuleBlock(weights)
        run, _ = compiled(block, options)
        with torch.no_grad():
            run(x)
            change(block)
            try:
                run(x)
            except bd.ConfigError as error:
                assert "written or replaced" in str(error), str(error)
            else:
                raise AssertionError(f"{change.__name__} went unnoticed")
    return "writes noticed"


def check_one_rank_contradicts(options: argparse.Namespace) -> str:
    """Data that contradicts the declaration on the last rank alone: no rank rewrites the path, all say which rank."""
    weights = whole(options.device)
    last = dist.get_world_size() - 1
    block = ModuleBlock(weights)
    if dist.get_rank() == last:
        with torch.no_grad():
            block.up.lora_b[0, 0] = 1.0
    run, reports = compiled(block, options)
    with torch.no_grad():
        run(torch.ones(2, 4, 16, dtype=torch.float64, device=options.device))
    (report,) = reports
    assert report.stages[-1].census.total(Origin.LORA) == 1
    (refusal,) = report.stage("localize declared").stats.refusals
    assert f"rank {last}" in refusal.reason or dist.get_rank() == last, refusal.reason
    return "one rank's refusal is all ranks'"


def check_report(options: argparse.Namespace) -> str:
    """Each rank writes what it compiled, and all say that it is the same; the twin: the last rank's block differs."""
    weights = whole(options.device)
    size, rank = dist.get_world_size(), dist.get_rank()
    x = torch.ones(2, 4, 16, dtype=torch.float64, device=options.device)

    class Unlike(torch.nn.Module):
        """As the others, but for a product that no collective shows."""

        def __init__(self) -> None:
            super().__init__()
            self.block = ModuleBlock(weights)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * (2.0 if rank == size - 1 else 3.0)

    models = (("same", ModuleBlock(weights), options.inner), ("unlike", Unlike(), "eager"))
    for name, model, inner in models:
        folder = options.folder / f"reports_{name}"
        torch._dynamo.reset()
        settings = {"inner": inner, "report": folder}
        with torch.no_grad():
            torch.compile(model, backend="bdlora", options=settings, fullgraph=True)(x)
        dist.barrier()
        assert len([*folder.glob("graph-0.rank-*.html")]) == size
        for writer in range(size):
            told = bd.Explanation.read(folder / f"graph-0.rank-{writer}.json")
            assert told.ranks is not None
            assert (told.ranks.rank, told.ranks.size) == (writer, size)
            if name == "same":
                assert told.ranks.difference is None, told.ranks.difference
            else:
                assert told.ranks.difference is not None
                assert told.ranks.difference.startswith(f"rank {size - 1} has fold: ")
                assert "2.0" in told.ranks.difference
                assert "3.0" in told.ranks.difference
        check_code(told, inner)
    return f"reports of {size} ranks compared"


def check_code(told: bd.Explanation, inner: str) -> None:
    """A record holds what Inductor made, with the lines of most products, and no folder of the machine."""
    if inner != "inductor":
        assert not told.code
        return
    (code,) = told.code
    assert "def call(" in code.text
    lines = code.text.splitlines()
    products = [node.key for node in told.graphs[0].stages[-1].nodes if node.operator in ("mm", "addmm")]
    assert products
    for key in products:
        assert code.nodes[key], f"{key} is nowhere in {sorted(code.nodes)}"
        assert all("Source Nodes" in lines[number - 1] for number in code.nodes[key])
    assert str(Path.home()) not in code.text


def check_hugging_face(options: argparse.Namespace) -> str:
    """transformers' tensor parallelism with PEFT's ordinary LoRA: PEFT's all-reduces are folded into the base's."""
    model = AutoModelForCausalLM.from_pretrained(
        options.folder / "model",
        distributed_config=DistributedConfig(tp_size=dist.get_world_size()),
        dtype=torch.float64,
    )
    wrapped: Any = PeftModel.from_pretrained(model, options.folder / "plain", autocast_adapter_dtype=False).eval()
    ids = torch.randint(3, 120, (2, 7), generator=torch.Generator().manual_seed(1)).to(options.device)
    run, reports = compiled(wrapped, options)
    with torch.no_grad():
        found = run(ids, use_cache=False).logits
    found = found.full_tensor() if hasattr(found, "full_tensor") else found
    expected = Reference(options.folder / "model", {"plain": options.folder / "plain"}, torch.float64)
    error = relative_error(found.cpu(), expected.logits(ids.cpu(), ["plain"] * 2))
    assert error < MODEL_TOLERANCE, f"relative error {error:.1e}"
    (report,) = reports
    before, after = report.stage("tag paths").census, report.stages[-1].census
    layers = 2
    assert before.total(Origin.LORA) == 2 * layers, report.summary()
    assert after.total(Origin.LORA) == 0, report.summary()
    assert after.total(Origin.BASE) == before.total(Origin.BASE), report.summary()
    return f"Hugging Face and PEFT: {before.total()} collectives to {after.total()}, relative error {error:.1e}"


def check_parallelize_module(options: argparse.Namespace) -> str:
    """A Llama sharded by `parallelize_module`, LoRA by S-LoRA's plan: declared factors lose their collectives."""
    size = dist.get_world_size()
    mesh = init_device_mesh(options.device.type, (size,))
    layers = ModelSpec().layers
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float64)
    peft_model: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=["up_proj", "down_proj"]))
    peft_model.eval().requires_grad_(False).to(options.device)
    nblocks = 2 * size
    torch.manual_seed(5)
    for layer in peft_model.base_model.model.model.layers:
        for projection, is_column in ((layer.mlp.up_proj, True), (layer.mlp.down_proj, False)):
            a, b = projection.lora_A["default"].weight, projection.lora_B["default"].weight
            for factor, in_blocks in ((a, not is_column), (b, is_column)):
                rows, columns = factor.shape
                blocks = torch.randn(nblocks, rows // nblocks, columns // nblocks, dtype=torch.float64) * 0.3
                dense = torch.randn(rows, columns, dtype=torch.float64) * 0.1
                factor.data.copy_(torch.block_diag(*blocks) if in_blocks else dense)
    ids = torch.randint(3, 120, (2, 7), generator=torch.Generator().manual_seed(1)).to(options.device)
    with torch.no_grad():
        expected = peft_model(ids, use_cache=False).logits
    plan = {
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj.base_layer": ColwiseParallel(),
        "mlp.up_proj.lora_A.default": ColwiseParallel(output_layouts=Replicate()),
        "mlp.up_proj.lora_B.default": ColwiseParallel(),
        "mlp.down_proj.base_layer": RowwiseParallel(),
        "mlp.down_proj.lora_A.default": RowwiseParallel(),
        "mlp.down_proj.lora_B.default": ColwiseParallel(output_layouts=Replicate()),
    }
    for layer in peft_model.base_model.model.model.layers:
        parallelize_module(layer, mesh, plan)
        bd.declare_block_diagonal(layer.mlp.up_proj.lora_B["default"], nblocks)
        bd.declare_block_diagonal(layer.mlp.down_proj.lora_A["default"], nblocks)
    run, reports = compiled(peft_model, options)
    with torch.no_grad():
        found = run(ids, use_cache=False).logits
    error = relative_error(found.cpu(), expected.cpu())
    assert error < MODEL_TOLERANCE, f"relative error {error:.1e}"
    (report,) = reports
    before, after = report.stage("tag paths").census, report.stages[-1].census
    # Before: a gather at up, an all-reduce and a gather at down; the layer's own all-reduce stays.
    assert after.total() == layers, report.summary()
    return f"parallelize_module: {before.total()} collectives to {after.total()}, relative error {error:.1e}"


def check_sabotage(options: argparse.Namespace) -> str:
    """The twin: parts of B that go to the wrong rank make the comparisons fail."""
    intact = foreign_program.parts_for_ranks
    foreign_program.parts_for_ranks = lambda *args: intact(*args)[::-1]
    noticed = 0
    try:
        for check in (check_blocks, check_parallelize_module):
            try:
                check(options)
            except AssertionError:
                noticed += 1
    finally:
        foreign_program.parts_for_ranks = intact
    assert noticed == 2, "wrong parts of a factor went unnoticed"
    return "sabotage noticed"


def main() -> int:
    """Run all cases; rank 0 prints a line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    options.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(options.device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timedelta(seconds=240))
    if dist.get_rank() == 0:
        save_model(ModelSpec(), options.folder / "model")
        save_adapter(AdapterSpec(rank=4), options.folder / "model", options.folder / "plain")
    dist.barrier()
    cases = (
        check_blocks,
        check_writes,
        check_one_rank_contradicts,
        check_report,
        check_hugging_face,
        check_parallelize_module,
        check_sabotage,
    )
    for case in cases:
        if options.only in case.__name__:
            line = case(options)
            if dist.get_rank() == 0:
                print(f"case: {line}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
