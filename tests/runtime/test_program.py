"""What fills a region's placeholders."""

from types import SimpleNamespace
from typing import Any

import torch

from bdlora_compile.runtime.program import _rows_before


def test_rows_of_the_layer_before() -> None:
    """Those of its sites, however many it has; zeros, in which no slot has an adapter, before the first."""
    rows = {"model.layers.0": slice(0, 2), "model.layers.1": slice(2, 5), "model.layers.2": slice(5, 7)}
    plan: Any = SimpleNamespace(rows=rows.__getitem__)
    table = torch.arange(1, 8)
    assert _rows_before("model.layers.2", table, plan).tolist() == [3, 4, 5]
    assert _rows_before("model.layers.1", table, plan).tolist() == [1, 2]
    assert _rows_before("model.layers.0", table, plan).tolist() == [0, 0]
