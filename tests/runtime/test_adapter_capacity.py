"""The table of docs/adapters.md: bytes of an adapter on a rank, and how many a budget holds."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bdlora_compile.deploying import served_sites
from bdlora_compile.factors import Layout
from bdlora_compile.placement import Mesh
from bdlora_compile.plan import ModelPlan, plan_model
from bdlora_compile.runtime.adapter_stats import adapter_elements

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
BUDGET = 4_000_000_000
LAYERS = {"8B": 32, "70B": 80}
SIZES = {"8B": (4096, 14336, 32), "70B": (8192, 28672, 64)}
"""hidden_size, intermediate_size, attention heads of Llama 3.1; 8 kv heads."""
ROWS = re.findall(r"^\| (8B|70B), N = (\d), R = (\d+) \|(.*)\|$", DOCS.read_text(), re.MULTILINE)


def plan_of(model: str, ranks: int, layout: Layout) -> ModelPlan:
    """Of one layer: all layers are alike."""
    hidden, intermediate, heads = SIZES[model]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=8,
        num_hidden_layers=1,
        vocab_size=128,
    )
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    mesh = Mesh(ranks)
    sites = served_sites(hollow, mesh, strict=True)
    layouts = dict.fromkeys(sites, layout)
    return plan_model(hollow, sites, mesh, layouts, 64, torch.bfloat16, torch.device("meta"))


def cell(plan: ModelPlan, layers: int, rank: int, nblocks: int) -> str:
    """As the table has it."""
    size = layers * adapter_elements(plan, rank, nblocks) * plan.dtype.itemsize
    return f"{size / 1e6:.1f} MB: {BUDGET // size}"


def test_there_is_a_table() -> None:
    assert len(ROWS) >= 5


@pytest.mark.parametrize(("model", "ranks", "rank", "cells"), ROWS, ids=[" ".join(row[:3]) for row in ROWS])
def test_the_table_of_the_docs_is_what_ranks_hold(model: str, ranks: str, rank: str, cells: str) -> None:
    local, slora = (plan_of(model, int(ranks), layout) for layout in (Layout.LOCAL, Layout.SLORA))
    found = [cell(plan, LAYERS[model], int(rank), blocks) for plan, blocks in ((local, 8), (local, 1), (slora, 1))]
    assert [part.strip() for part in cells.split("|")] == found
