"""Adapters that come, go and move while steps run: on a GPU with its streams and graphs, elsewhere with a stand-in.

Uploads are made slow on purpose: what does not wait for them then goes wrong for certain. Every order that is kept has
a twin that breaks it. On a GPU: ``pytest tests/runtime/test_uploads.py``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import bdlora_compile as bd
from bdlora_compile import deploying
from bdlora_compile.backend import bdlora
from bdlora_compile.runtime.adapter_pool import Move
from bdlora_compile.runtime.bank import AdapterBank, StagedAdapter
from bdlora_compile.runtime.copier import Copier, StreamCopier, Ticket, Work
from tests.models import AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model
from tests.runtime.late_copier import LateCopier
from tests.runtime.test_bank import SITES, SIZE, staged
from tests.runtime.test_bank import answer as answer_of

IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if IS_CUDA else torch.device("cpu")
SLOWNESS = 100_000_000
"""Clock cycles of a GPU: some 50 ms, more than everything here takes."""
on_gpu = pytest.mark.skipif(not IS_CUDA, reason="the order of streams")


class SlowStreams(StreamCopier):
    """Uploads start late."""

    def upload(self, work: Work) -> Ticket:
        def slowly() -> None:
            torch.cuda._sleep(SLOWNESS)
            work()

        return super().upload(slowly)


def slow_copier(device: torch.device) -> Copier:
    """Late uploads: of a GPU's own, or of the stand-in's."""
    return SlowStreams(device) if device.type == "cuda" else LateCopier()


def impatient(copier: Copier) -> Copier:
    """Sabotage: steps do not wait."""
    copier.step = lambda tickets: None  # type: ignore[method-assign]
    return copier


def bank(copier: Copier | None = None, device: torch.device = DEVICE) -> AdapterBank:
    return AdapterBank(SITES, 4, 4096, 8, torch.float64, device, copier)


def answer(of: AdapterBank, slot: int) -> torch.Tensor:
    return answer_of(of, slot).cpu()


def expected(seed: int) -> torch.Tensor:
    plain = bank(device=torch.device("cpu"))
    plain.write(0, staged(plain, 4, seed), 0)
    return answer_of(plain, 0)


def is_near(found: torch.Tensor, seed: int) -> bool:
    """Within float64's rounding of sums in another order."""
    return torch.allclose(found, expected(seed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sabotage", [False, True])
def test_a_step_waits_for_its_uploads(sabotage: bool) -> None:
    copier = slow_copier(DEVICE)
    own = bank(impatient(copier) if sabotage else copier)
    own.write(0, staged(own, 4, seed=0), 0)
    assert is_near(answer(own, 0), 0) is not sabotage


@pytest.mark.parametrize("sabotage", [False, True])
def test_a_move_waits_for_uploads(sabotage: bool) -> None:
    copier = slow_copier(DEVICE)
    own = bank(copier)
    own.write(0, staged(own, 4, seed=0), SIZE)
    if sabotage:
        own._uploads.clear()
    own.move([Move(0, SIZE, 0, SIZE)])
    impatient(copier)
    assert is_near(answer(own, 0), 0) is not sabotage


@on_gpu
@pytest.mark.parametrize("sabotage", [False, True])
def test_an_upload_waits_for_steps_that_may_read_its_room(sabotage: bool) -> None:
    """The step is on its way when its slot is freed and its room given to another."""
    own = bank(StreamCopier(DEVICE))
    own.write(0, staged(own, 4, seed=0), 0)
    own.before_step([0])
    torch.cuda.synchronize()
    before = own.pool[:SIZE].clone()
    successor = staged(own, 4, seed=1)
    torch.cuda._sleep(SLOWNESS)
    read = own.pool[:SIZE].clone()
    if sabotage:
        own._copier._uploads.wait_stream = lambda stream: None  # type: ignore[attr-defined]
        own._sizes.clear()
    else:
        own.clear(0)
    own.write(0, successor, 0)
    torch.cuda.synchronize()
    assert torch.equal(read, before) is not sabotage


@on_gpu
@pytest.mark.parametrize("sabotage", [False, True])
def test_host_memory_is_kept_until_its_upload_is_over(sabotage: bool) -> None:
    """The host tier may forget a chunk at once: its memory must not be given to the next one while it is read."""
    own = bank(slow_copier(DEVICE))
    chunk: StagedAdapter = staged(own, 4, seed=0)
    own.write(0, chunk, 0)
    if sabotage:
        chunk.chunk.fill_(torch.nan)
    del chunk
    others = [torch.full((SIZE,), torch.nan, dtype=torch.float64, pin_memory=True) for _ in range(8)]
    assert is_near(answer(own, 0), 0) is not sabotage
    assert len(others) == 8


# --- a model --------------------------------------------------------------------------------------------------------

DTYPE = torch.float16 if IS_CUDA else torch.float64
TOLERANCE = 2e-2 if IS_CUDA else 1e-9
"""Of logits against float64. fp16: two layers of activations rounded to 2^-11, a few 1e-3 together; adapters differ by
more than 0.2, which the test holds against it."""
ROWS = 3
STEPS = 36
COUNT = 7
MODEL = ModelSpec(heads=4, kv_heads=2, head_dim=16, layers=2, intermediate=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and adapters: two kinds, two ranks."""
    folder = tmp_path_factory.mktemp("uploads")
    save_model(MODEL, folder / "model")
    for index in range(COUNT):
        spec = AdapterSpec(rank=8 - 4 * (index % 2), nblocks=2 * (index // 2 % 2))
        save_adapter(spec, folder / "model", folder / f"a{index}", seed=index)
    return folder


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows_of(step: int) -> list[str | None]:
    """Every third step keeps the rows, the others change one; more adapters than slots, so that some are evicted."""
    number = step - step // 3
    return [f"a{number % 5}", None if number % 4 == 0 else f"a{(number + 1) % 5}", f"a{number * 3 % 5}"]


def contents(name: str | None, step: int) -> str | None:
    """The folder whose contents a name has at a step: a1 is loaded again in the middle, with those of a6."""
    return "a6" if name == "a1" and step >= STEPS // 2 else name


def tokens() -> torch.Tensor:
    return torch.randint(3, 120, (ROWS, STEPS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference(folder: Path) -> torch.Tensor:
    """[2, rows, steps, vocabulary] in float64 by PEFT, of weights as the model has them: of the rows' adapters, and,
    to see what they differ by, of others."""
    whole = Reference(folder / "model", {f"a{index}": folder / f"a{index}" for index in range(COUNT)}, torch.float64)
    for parameter in whole.model.parameters():
        parameter.data = parameter.data.to(DTYPE).double()
    ids, out = tokens(), torch.empty(2, ROWS, STEPS, MODEL.vocabulary, dtype=torch.float64)
    for lag, row in [(lag, row) for lag in range(2) for row in range(ROWS)]:
        cache = DynamicCache()
        for step in range(STEPS):
            name = contents(rows_of(step)[row], step)
            of = name if lag == 0 else f"a{(int(name[1:]) + 1) % 5}" if name else "a0"
            out[lag, row, step] = one_token(whole.model, of, ids[row : row + 1, step : step + 1], cache)
    return out


@torch.no_grad()
def one_token(peft_model: Any, name: str | None, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits [vocabulary] of the next token of a row."""
    peft_model.base_model.enable_adapter_layers()
    if name is None:
        peft_model.base_model.disable_adapter_layers()
    else:
        peft_model.set_adapter(name)
    return peft_model(token, past_key_values=cache, use_cache=True).logits[0, -1]  # type: ignore[no-any-return]


def decode(folder: Path, copier: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, bd.AdapterStats]:
    """Logits of rows that decode while adapters are loaded, reloaded, unloaded, evicted and prefetched."""
    monkeypatch.setattr(deploying, "copier_for", copier)
    model, adapters = bd.load(folder / "model", max_adapters=ROWS, max_rank=8, dtype=DTYPE, device=DEVICE)
    model.compile(backend=bdlora, options={"inner": "eager"})
    for index in range(3):
        adapters.load(f"a{index}", folder / f"a{index}")
    cache = bd.make_cache(model, ROWS, STEPS)
    ids, logits = tokens().to(DEVICE), []
    # Read beside the first step.
    pending = [adapters.begin_load(f"a{index}", folder / f"a{index}") for index in (3, 4)]
    with torch.no_grad():
        for step in range(STEPS):
            if step == 1:
                for one in pending:
                    one.commit()
            if step == STEPS // 2:
                adapters.load("a1", folder / "a6")
            if step == 10:
                adapters.load("a5", folder / "a5")
                adapters.prefetch("a5")
                adapters.unload("a5")
            # Not waited for: the device is several steps behind the host.
            with adapters.use(rows_of(step)):
                logits.append(model(ids[:, step : step + 1], past_key_values=cache).logits[:, -1])
    graphs = bd.reports(model)
    if IS_CUDA:
        replayed = sum(report.step_graphs.replayed for report in graphs if report.step_graphs)
        assert replayed > STEPS // 2, [report.summary() for report in graphs]
    return torch.stack(logits, 1).double().cpu(), adapters.stats()


@on_gpu
@pytest.mark.usefixtures("fresh_dynamo")
def test_rows_decode_while_adapters_come_and_go(
    folder: Path, reference: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is synchronised, uploads are late, graphs are replayed: every row is still that of its adapter."""
    found, stats = decode(folder, slow_copier, monkeypatch)
    right, wrong = reference
    error = relative_error(found, right)
    print(f"relative error against float64 {error:.1e} on {DEVICE}, {stats.evictions} evictions, {stats.misses} misses")
    nearest = float(((found - wrong).abs().amax(-1) / right.abs().max()).min())
    print(f"another adapter is {nearest:.1e} away")
    assert error < TOLERANCE
    assert stats.evictions > 5
    assert nearest > 2 * TOLERANCE, "the tolerance tells adapters apart"

    torch._dynamo.reset()
    broken, _ = decode(folder, lambda device: impatient(slow_copier(device)), monkeypatch)
    assert not relative_error(broken, right) < 2 * TOLERANCE, "steps that do not wait go wrong"
