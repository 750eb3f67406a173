"""What each stage makes of small blocks that others sharded, as text; a second run of a pass changes nothing."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from slora_blocks import ModuleBlock, Whole, functional_block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.torch_version import TorchVersion

from bdlora_compile.explanation import RankComparison
from bdlora_compile.foreign.compile import localize
from bdlora_compile.ir import Origin
from bdlora_compile.printer import print_graph
from bdlora_compile.run_report import record_of
from bdlora_compile.runtime.agreement import Alone
from tests.api.test_inspector import timeless
from tests.conftest import GoldenCheck
from tests.foreign.harness import Block, RankRun, capture, fake_rank

X = torch.zeros(3, 5, 16, dtype=torch.float64)


def whole() -> Whole:
    torch.manual_seed(0)
    return Whole.random(width=16, inner=48, rank=8, nblocks=2)


class PeftLike(nn.Module):
    """An MLP with ordinary LoRA on its second layer, sharded by `parallelize_module` as PEFT's is by Hugging Face."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(16, 48, bias=False)
        self.down = nn.Linear(48, 16, bias=False)
        self.lora_a = nn.Linear(48, 4, bias=False)
        self.lora_b = nn.Linear(4, 16, bias=bias)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        h = F.silu(self.up(x))
        return x + (self.down(h) + 2.0 * self.lora_b(self.lora_a(h)))


def sharded_peft(bias: bool = False) -> Block:
    model = PeftLike(bias)
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "lora_a": RowwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


CASES: dict[str, Callable[[], Block]] = {
    "modules": lambda: ModuleBlock(whole()),
    "function": lambda: functional_block(whole()),
    "modules_undeclared": lambda: ModuleBlock(whole(), declare=False),
    "peft_like": sharded_peft,
}


@pytest.mark.parametrize("name", CASES)
def test_stages(name: str, golden: GoldenCheck) -> None:
    """The graph before and after, and in between where something happened."""
    if name == "peft_like" and TorchVersion(torch.__version__) < "2.12":
        pytest.skip("the text is that of later releases, where a mesh is an argument of its own")
    run = capture(CASES[name], 1, 2, X)
    for number, stage in enumerate(run.report.stages):
        if number == 0 or stage.stats.matches:
            golden(f"{name}_{number}_{stage.name.replace(' ', '_')}", stage.text)


@pytest.mark.parametrize("name", ["modules", "modules_undeclared"])
def test_texts(name: str, golden: GoldenCheck) -> None:
    """The report of hand-written S-LoRA: what localize removes, and why not where its factors are not declared."""
    report = capture(CASES[name], 1, 2, X, has_views=True).report
    told = timeless(record_of(report, "forward", RankComparison(1, 2, None), "foreign", ""))
    golden(f"{name}_report", told.text(width=150))
    page = told.html()
    assert "tag paths" in page
    left = [one for one in told.graphs[0].stages[-1].collectives if one.origin is Origin.LORA]
    assert len(left) == (0 if name == "modules" else 2)
    assert all(one.reason for one in left)


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_changes_nothing(name: str) -> None:
    run = capture(CASES[name], 1, 2, X)
    with fake_rank(1, 2):
        # The second run still simplifies what localizing left; the third finds nothing.
        second = localize(run.foreign, Alone())
        assert all(stage.stats.matches == 0 for stage in second.stages[1:])
        before = print_graph(run.foreign.captured.graph)
        again = localize(run.foreign, Alone())
    assert print_graph(run.foreign.captured.graph) == before
    assert all(stage.stats.matches == 0 for stage in again.stages)


def lora_collectives(run: RankRun) -> tuple[int, int]:
    return run.report.stage("tag paths").census.total(Origin.LORA), run.report.stages[-1].census.total(Origin.LORA)


def test_all_reduce_of_a_replicated_factor_is_folded() -> None:
    """No licence is needed: B is whole on every rank, so the sum may come after it."""
    assert lora_collectives(capture(sharded_peft, 0, 2, X)) == (1, 0)


def test_a_bias_is_not_folded() -> None:
    """The twin: a bias would be counted once a rank."""
    assert lora_collectives(capture(lambda: sharded_peft(bias=True), 0, 2, X)) == (1, 1)
