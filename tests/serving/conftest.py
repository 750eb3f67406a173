"""A tiny compiled model on one rank, its adapters, a tokenizer, and what PEFT alone generates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import bdlora_compile as bd
from bdlora_compile.serving.batch import Batch
from bdlora_compile.serving.engine import Engine
from tests.models import AdapterSpec, ModelSpec, Reference, save_adapter, save_model

SPEC = ModelSpec(layers=1, heads=4, kv_heads=2, intermediate=48)
NAMES = ("a", "b", "c", "d")
EOS = 2


@dataclass(frozen=True)
class World:
    """What the tests of the engine share. Two adapters fit into the pool, of four that are known."""

    model: Any
    adapters: bd.AdapterSet
    tokenizer: Any
    paths: dict[str, Path]
    reference: Reference
    _known: dict[Any, tuple[int, ...]] = field(default_factory=dict)

    def alone(self, prompt: Sequence[int], adapter: str | None, count: int) -> tuple[int, ...]:
        """Greedy tokens of PEFT's eager model, one row, float64; an end-of-sequence token is not the end."""
        key = (tuple(prompt), adapter)
        if len(self._known.get(key, ())) < count:
            ids = torch.tensor([list(prompt)])
            found = self.reference.generate(ids, [adapter], torch.ones_like(ids), count)
            self._known[key] = tuple(found[0].tolist())
        return self._known[key][:count]

    def engine(self, **options: Any) -> Engine:
        """A small engine, not started."""
        return Engine(self.model, self.adapters, self.tokenizer, **{"max_rows": 3, "max_length": 48} | options)

    def references_held(self) -> int:
        """Rows and blocks that hold an adapter."""
        return sum(self.adapters[name].references for name in self.adapters.names)


def tokenizer_of(size: int) -> Any:
    """Token i is the text "<i>"; the first three are special."""
    words = {"[pad]": 0, "[bos]": 1, "[eos]": 2} | {f"<{index}>": index for index in range(3, size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[pad]", bos_token="[bos]", eos_token="[eos]")


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("engine")
    path = save_model(SPEC, folder / "model")
    paths = {
        name: save_adapter(AdapterSpec(rank=4, nblocks=2 * (index % 2)), path, folder / name, index)
        for index, name in enumerate(NAMES)
    }
    model, adapters = bd.load(path, paths, dtype=torch.float64, max_adapters=2, max_rank=4)
    model.compile(backend="bdlora")
    model.generation_config.eos_token_id = EOS
    return World(model, adapters, tokenizer_of(SPEC.vocabulary), paths, Reference(path, paths, torch.float64))


@pytest.fixture(scope="package")
def shared_engine(world: World) -> Iterator[Engine]:
    """One engine of three rows for the tests that leave it as it was."""
    with world.engine() as engine:
        yield engine


@pytest.fixture(params=[False, True], ids=["", "behind"])
def engine(
    shared_engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Engine]:
    """After each test nothing may be left: no row, no request, no reference to an adapter, no graph compiled.

    Each test runs as on a CPU, and as on a GPU, where the host reads a step's tokens after it launched the next one.
    """
    monkeypatch.setattr(Batch, "runs_behind", request.param)
    graphs = len(bd.reports(world.model))
    yield shared_engine
    assert shared_engine.failed is None
    stats = shared_engine.stats()
    assert (stats.rows_in_use, stats.waiting, stats.cache_tokens) == (0, {}, 0)
    assert world.references_held() == 0
    assert len(bd.reports(world.model)) == graphs


@pytest.fixture
def unstarted(world: World) -> Callable[..., Engine]:
    """Engines of other sizes."""
    return world.engine
