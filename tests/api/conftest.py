"""A tiny model and adapters on disk, shared by all tests of the interface."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bdlora_compile as bd
from tests.models import AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

TOLERANCE = 2e-6
"""As in tests/numerics/test_compiled.py."""
IDS = torch.tensor([[5, 9, 33, 71], [8, 8, 100, 4]])
COUNT = 6
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


@dataclass(frozen=True)
class Served:
    """A compiled model on two ranks with room for two adapters, and folders of six."""

    model: Any
    adapters: bd.AdapterSet
    paths: dict[str, Path]
    reference: Reference

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model(IDS).logits  # type: ignore[no-any-return]  # transformers is untyped for mypy

    def load(self, *names: str) -> None:
        """Load adapters under the names of their folders."""
        for name in names:
            self.adapters.load(name, self.paths[name])

    def resident(self) -> set[str]:
        """Names of the adapters that are in the pool."""
        return {name for name in self.adapters.names if self.adapters[name].is_resident}

    def error(self, rows: list[str | None]) -> float:
        """Of what runs now, against PEFT's adapters of these names."""
        return relative_error(self.logits(), self.reference.logits(IDS, rows))


@pytest.fixture(scope="module")
def compiled(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Served:
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("six")
    paths = {
        f"a{index}": save_adapter(
            AdapterSpec(rank=4, nblocks=2 * (index % 2)), files.model, folder / f"a{index}", index
        )
        for index in range(COUNT)
    }
    model, adapters = bd.load(files.model, dtype=torch.float64, max_adapters=2, max_rank=4, ranks=bd.Ranks.lockstep(2))
    model.compile(backend="bdlora")
    return Served(model, adapters, paths, Reference(files.model, paths, torch.float64))


@pytest.fixture
def served(compiled: Served) -> Served:
    """Nothing is loaded, whatever the test before did."""
    adapters = compiled.adapters
    for name in adapters.names:
        adapters.unload(name)
    stats = adapters.stats()
    assert (stats.known, stats.resident, stats.in_host_memory) == (0, 0, 0)
    assert (stats.pool_used_bytes, stats.host_used_bytes) == (0, 0)
    return compiled
