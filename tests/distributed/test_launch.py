"""Real processes over gloo: what the lock-step interpreter cannot show (process groups, the store, different seeds)."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import bdlora_compile as bd
from bdlora_compile.explanation import RankComparison
from tests.distributed.launch import command


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("arguments", "cases"), [(["--inner", "eager"], 5), (["--inner", "inductor", "--only-local"], 1)]
)
def test_two_ranks_agree_with_peft(tmp_path: Path, arguments: list[str], cases: int) -> None:
    """All cases of `tests.distributed.worker` pass on two ranks; compiling by Inductor takes long, so one of them."""
    launch = command(2, "tests.distributed.worker", tmp_path, *arguments)
    done = subprocess.run(launch, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == cases, done.stdout
    if "--only-local" in arguments:
        check_reports(tmp_path / "reports")


def check_reports(folder: Path) -> None:
    """Both ranks wrote both graphs, found them alike, and hold the code of each region, with LoRA and without."""
    for rank in range(2):
        records = [bd.Explanation.read(path) for path in sorted(folder.glob(f"graph-*.rank-{rank}.json"))]
        # All logits, then generate's last ones, then a token.
        assert [told.graphs[0].phase.split()[0] for told in records] == ["prefill", "prefill", "decode"]
        for told in records:
            assert told.ranks == RankComparison(rank, 2, None)
            regions = [(code.region, code.is_base_only) for code in told.code]
            parts = ["before layers", "model.layers.0", "after layers"]
            assert regions == [(part, is_base_only) for is_base_only in (False, True) for part in parts]
            layer = told.code[1]
            assert len(layer.layers) == told.num_layers
            assert "bdlora.lora" in layer.text
            assert "bdlora.lora" not in told.code[4].text
            products = [node.key for node in told.graphs[0].stages[-1].nodes if node.kind == "product" and node.layer]
            assert [key for key in products if key not in layer.nodes] == []
            assert sum(bool(layer.nodes[key]) for key in products) >= len(products) // 2, layer.nodes
            assert len(told.html()) < 5e6
            shapes = weight_shapes(told)
            assert len(shapes) >= 5, "q/k/v, o, gate/up, down and the embedding"
            assert [code.region for code in told.code if shapes & shapes_made(code.text)] == [], "a weight is copied"


def weight_shapes(told: bd.Explanation) -> set[tuple[int, ...]]:
    """Shapes of the products' weights on this rank, and their transposes."""
    nodes = told.graphs[0].stages[-1].nodes
    types = [node.type for node in nodes if node.source and node.source.startswith("weight")]
    shapes = {tuple(int(size) for size in re.findall(r"\d+", text.partition("[")[2])) for text in types}
    return {way for shape in shapes if len(shape) == 2 for way in (shape, shape[::-1])}


def shapes_made(code: str) -> set[tuple[int, ...]]:
    """Shapes, of those that are known numbers, of the tensors that compiled code allocates."""
    found = re.findall(r"empty_strided_\w+\(\(([\d, ]+)\)", code)
    return {tuple(int(size) for size in sizes.split(",") if size.strip()) for sizes in found}


def test_a_copied_weight_is_seen() -> None:
    """The twin of what reports are checked for: a weight that is computed is a copy."""
    x, weight = torch.randn(3, 64), torch.randn(96, 64)
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        _, code = run_and_get_code(torch.compile(lambda x, weight: F.linear(x, weight * 2)), x, weight)
    assert (96, 64) in shapes_made("".join(code))
