"""The table of docs/cost-model.md that holds estimates against steps on H200s says what both are today."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bdlora_compile as bd
from bdlora_compile.deploying import served_sites
from bdlora_compile.factors import Layout
from bdlora_compile.known_models import known_config
from bdlora_compile.machine import find_machine
from bdlora_compile.placement import Mesh
from bdlora_compile.sites import Site
from bdlora_compile.timing import Declared, Seconds, Terms, group_sites, lora_seconds
from tests.cli.test_performance_page import OF_FOUR, RUNS, measured

PAGE = Path(__file__).parents[2] / "docs" / "cost-model.md"
COLUMNS = {
    "block-diagonal r = 32, local": ("BD r=32 G=8", Layout.LOCAL, 32, 8),
    "ordinary r = 16, local": ("ordinary r=16", Layout.LOCAL, 16, 1),
    "ordinary r = 16, S-LoRA": ("ordinary r=16", Layout.SLORA, 16, 1),
}
"""Kind of adapters in the file, layout, R and G."""
LAYERS = {"8B": 32, "70B": 80}
Row = tuple[str, int, str, int, int, int, int]


def rows() -> list[Row]:
    """Model, GPUs, name, tokens, adapters, estimated and measured microseconds."""
    cells = r"^\| (\d+B), (\d) \| ([^|]+) \| (\d+), (\d+) \| (\d+) \| (\d+) \|$"
    found = re.findall(cells, PAGE.read_text(), re.MULTILINE)
    return [(model, int(size), name, *map(int, numbers)) for model, size, name, *numbers in found]


def file_of(model: str, size: int) -> str:
    """Results with adapters on all sites."""
    return OF_FOUR[model == "70B"] if size == 4 else RUNS["a"]


@cache
def sites_of(model: str, ranks: int) -> Mapping[str, Site]:
    """Of Llama-3.1, by its size."""
    config = known_config(f"llama-3.1-{model.lower()}")
    with torch.device("meta"):
        return served_sites(AutoModelForCausalLM.from_config(config), Mesh(ranks), strict=True)


def estimate(model: str, ranks: int, load: bd.Workload, layout: Layout, rank: int, blocks: int) -> float:
    """Seconds of a layer's LoRA on H200s, all adapters alike."""
    sites = sites_of(model, ranks)
    terms = Terms(Mesh(ranks), load, find_machine("h200-nvlink"), rank, element_size=2)
    profiles = [{site: Declared.along_split_dim(own.role, rank, blocks) for site, own in sites.items()}]
    return sum((lora_seconds(group, layout, profiles, terms) for group in group_sites(sites)), Seconds()).total


@pytest.mark.parametrize("row", rows(), ids=lambda row: " ".join(map(str, row[:5])))
def test_a_row_is_the_estimate_and_the_measurement(row: Row) -> None:
    model, size, name, tokens, adapters, told, took = row
    kind, layout, rank, blocks = COLUMNS[name]
    layer = estimate(model, size, bd.Workload(tokens, adapters), layout, rank, blocks)
    assert told == round(layer * 1e6)
    results = measured(file_of(model, size))
    step, base = results[layout.value, kind, tokens, adapters], results["base", "none", tokens, 1]
    assert took == round((step["gpu"] - base["gpu"]) * 1e3 / LAYERS[model])
    # What the page says: up to nearly three times what was measured where LoRA is little work, and not below it.
    assert 0.95 < told / took < (3 if model == "70B" or tokens == 16 else 2.3)


def test_the_kernels_estimates_are_those_of_the_page() -> None:
    """Rank 0 of 8 alone; and the page says in which range the measured times lie above them."""
    found = re.findall(
        r"^\| (8B|70B), ([a-z-]+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE
    )
    assert len(found) == 12
    above = []
    for model, kind, rank, tokens, told, took in found:
        blocks = 8 if kind == "block-diagonal" else 1
        layer = estimate(model, 8, bd.Workload(int(tokens), int(tokens)), Layout.LOCAL, int(rank), blocks)
        assert told == f"{layer * 1e6:.1f}"
        above.append(float(took) / float(told))
    assert f"takes {min(above):.1f} to {max(above):.1f} times its estimate" in PAGE.read_text()


def test_layouts_are_in_their_order() -> None:
    """Ordinary adapters: where the measurement prefers a layout, by more than a tenth, the estimate does."""
    found = {(row[2], *row[:2], *row[3:5]): row[5:] for row in rows()}
    assert len(found) == 27
    for (name, model, size, tokens, adapters), (told, took) in found.items():
        if name == "ordinary r = 16, S-LoRA":
            local = found["ordinary r = 16, local", model, size, tokens, adapters]
            assert abs(took - local[1]) <= 0.1 * took or (told > local[0]) == (took > local[1])


def test_a_step_in_another_layout_costs_what_is_estimated() -> None:
    """S-LoRA's less the local layout's, ordinary adapters, 16 rows: performance.md has these numbers; not so of 70B."""
    told, layouts = {}, (Layout.SLORA, Layout.LOCAL)
    for model, size in (("8B", 2), ("8B", 4), ("70B", 4)):
        results = measured(file_of(model, size))
        steps = [results[layout.value, "ordinary r=16", 16, 16]["gpu"] for layout in layouts]
        layers = [estimate(model, size, bd.Workload(16, 16), layout, 16, 1) for layout in layouts]
        expected = (layers[0] - layers[1]) * 1e3 * LAYERS[model]
        told[model, size] = f"{steps[0] - steps[1]:.2f}", f"{expected:.2f}"
        assert model == "70B" or expected == pytest.approx(steps[0] - steps[1], rel=0.1)
    assert told == {("8B", 2): ("0.27", "0.27"), ("8B", 4): ("0.46", "0.46"), ("70B", 4): ("0.46", "0.11")}
