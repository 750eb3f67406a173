"""What fills a region's placeholders."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlora_compile.ir import BankField, BankSource
from bdlora_compile.placement import Replicate
from bdlora_compile.runtime.program import bind


@pytest.mark.parametrize("field", [BankField.SLOTS, BankField.SCALES])
def test_rows_of_a_layer(field: BankField) -> None:
    """Those of its sites, however many it has; all rows where no layer is named. Views: a load changes them."""
    rows = {"model.layers.0": slice(0, 2), "model.layers.1": slice(2, 5), "model.layers.2": slice(5, 7)}
    plan: Any = SimpleNamespace(rows=rows.__getitem__)
    table = torch.arange(1, 8)
    state: Any = SimpleNamespace(bank=SimpleNamespace(**{field.value: table}))
    sources = [BankSource(field, "model.layers.1"), BankSource(field, "model.layers.2"), BankSource(field)]
    found = bind(sources, [Replicate()] * 3, state, plan)
    table += 10
    values = [value.tolist() for value in found if isinstance(value, Tensor)]
    assert values == [[13, 14, 15], [16, 17], table.tolist()]
