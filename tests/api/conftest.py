"""A tiny model and adapters on disk, shared by all tests of the interface."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

SPEC = ModelSpec(layers=1, heads=4, kv_heads=2, intermediate=48)


@dataclass(frozen=True)
class Files:
    """Where the model and its adapters lie."""

    model: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """One layer, and an adapter of each kind: "blocks" and "plain"."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_model(SPEC, folder / "model")
    specs = {"blocks": AdapterSpec(rank=4, nblocks=2), "plain": AdapterSpec(rank=5)}
    paths = {name: save_adapter(spec, model, folder / name, seed) for seed, (name, spec) in enumerate(specs.items())}
    return Files(model, paths)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graphs of other tests, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
