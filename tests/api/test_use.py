"""Choosing adapters: by row, by token, nested, outside a forward, with rows that `generate` repeats; loads."""

from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest
import torch

import bdlora_compile as bd
from tests.api.conftest import Files
from tests.models import Reference, relative_error

TOLERANCE = 2e-6
"""As in tests/numerics/test_compiled.py."""
IDS = torch.tensor([[5, 9, 33, 71], [8, 8, 100, 4]])
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def served(files: Files) -> tuple[Any, Any]:
    """A compiled model on two ranks, float64."""
    torch._dynamo.reset()
    model, adapters = bd.load(files.model, files.adapters, dtype=torch.float64, ranks=bd.Ranks.lockstep(2))
    model.compile(backend="bdlora")
    model.generation_config.eos_token_id = None
    return model, adapters


@pytest.fixture(scope="module")
def reference(files: Files) -> Reference:
    """PEFT, eager, float64."""
    return Reference(files.model, files.adapters, torch.float64)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Compiled logits."""
    return model(ids).logits  # type: ignore[no-any-return]  # transformers is untyped for mypy


def test_nested_use(served: tuple[Any, Any], reference: Reference) -> None:
    """The innermost choice holds; after it the outer one, after both the base model; also when a forward raised."""
    model, adapters = served
    with adapters.use(["plain", "blocks"]):
        with adapters.use("blocks"):
            assert relative_error(logits(model), reference.logits(IDS, ["blocks", "blocks"])) < TOLERANCE
        with pytest.raises(ZeroDivisionError), adapters.use(None):
            raise ZeroDivisionError
        assert relative_error(logits(model), reference.logits(IDS, ["plain", "blocks"])) < TOLERANCE
    assert relative_error(logits(model), reference.logits(IDS, [None, None])) < TOLERANCE
    assert relative_error(logits(model), reference.logits(IDS, ["plain", None])) > 1e-3


def test_by_token(served: tuple[Any, Any], reference: Reference) -> None:
    """Two packed halves of a row: tokens before the change of adapter equal that adapter's, later ones neither's."""
    model, adapters = served
    names = [["plain", "plain", "blocks", "blocks"], [None, None, None, "plain"]]
    with adapters.use(names):
        found = logits(model)
    first = reference.logits(IDS, ["plain", None])
    assert relative_error(found[0, :2], first[0, :2]) < TOLERANCE
    assert relative_error(found[1, :3], first[1, :3]) < TOLERANCE
    assert relative_error(found[0, 2:], first[0, 2:]) > 1e-3
    assert relative_error(found[1, 3:], first[1, 3:]) > 1e-3
    uniform = [["plain"] * 4, ["blocks"] * 4]
    with adapters.use(uniform):
        assert relative_error(logits(model), reference.logits(IDS, ["plain", "blocks"])) < TOLERANCE


def test_by_token_serves_one_forward_only(served: tuple[Any, Any]) -> None:
    """The next token of `generate` has no choice: refused, not guessed."""
    model, adapters = served
    with adapters.use([["plain"] * 4, ["blocks"] * 4]), pytest.raises(bd.ConfigError, match="one forward only"):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("names", [["plain"], ["plain", None, None], [["plain"] * 3] * 2, [["plain"] * 4]])
def test_wrong_lengths_are_refused(served: tuple[Any, Any], names: Any) -> None:
    """As many names as rows, or as tokens."""
    model, adapters = served
    with adapters.use(names), pytest.raises(bd.ConfigError, match="as many names as the batch has rows"):
        logits(model)


@pytest.mark.parametrize("names", ["nobody", ["plain", "nobody"], [["plain", "nobody"]]])
def test_unknown_names_are_refused(served: tuple[Any, Any], names: Any) -> None:
    """Before anything runs; the choice that held still holds."""
    model, adapters = served
    with adapters.use("plain"):
        held = model.bdlora.selection
        with pytest.raises(bd.AdapterError, match=r"nobody.*plain.*adapters\.load"), adapters.use(names):
            pytest.fail("entered")
        assert model.bdlora.selection is held


@pytest.mark.parametrize("names", [[["plain", "plain"], ["plain"]], ["plain", ["plain"]]])
def test_ragged_names_are_refused(served: tuple[Any, Any], names: Any) -> None:
    """Rows of different length say so, as an error of ours."""
    _, adapters = served
    with pytest.raises(bd.ConfigError, match="same length"), adapters.use(names):
        pytest.fail("entered")


def test_several_returned_sequences_keep_their_row_adapter(served: tuple[Any, Any], reference: Reference) -> None:
    """Each of a row's samples is drawn from that row's adapter: with top_k=1 they are its greedy tokens."""
    model, adapters = served
    rows = ["plain", "blocks"]
    with adapters.use(rows):
        tokens = model.generate(
            IDS, attention_mask=MASK, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3
        )
    expected = reference.generate(IDS, rows, MASK, 4)
    assert torch.equal(tokens[:, 4:], expected.repeat_interleave(3, dim=0))
    assert not torch.equal(expected, reference.generate(IDS, rows[::-1], MASK, 4)), "the rows differ"


def test_beams_keep_their_row_adapter(served: tuple[Any, Any], reference: Reference) -> None:
    """Beam search equals transformers' own, row by row, with PEFT's adapter of that row."""
    model, adapters = served
    rows = ["plain", "blocks"]
    settings: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with adapters.use(rows):
        tokens = model.generate(IDS, attention_mask=MASK, **settings)
    peft = reference.model
    peft.generation_config.eos_token_id = None
    for row, name in enumerate(rows):
        peft.set_adapter(name)
        own = slice(row, row + 1)
        expected = peft.generate(input_ids=IDS[own], attention_mask=MASK[own], eos_token_id=None, **settings)
        assert torch.equal(tokens[row], expected[0])


def test_loads_between_calls_change_adapters_not_graphs(
    files: Files, served: tuple[Any, Any], reference: Reference
) -> None:
    """An adapter unloaded and loaded under another name serves at once; no graph is added."""
    model, adapters = served

    def generate(rows: Any) -> torch.Tensor:
        with adapters.use(rows):
            return model.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False)[:, 4:]  # type: ignore[no-any-return]

    expected = reference.generate(IDS, ["plain", "blocks"], MASK, 3)
    assert torch.equal(generate(["plain", "blocks"]), expected)
    graphs = len(bd.reports(model))
    adapters.unload("plain")
    with pytest.raises(bd.AdapterError, match="plain"), adapters.use("plain"):
        pytest.fail("entered")
    adapters.load("again", files.adapters["plain"])
    assert torch.equal(generate(["again", "blocks"]), expected)
    adapters.unload("again")
    adapters.load("plain", files.adapters["plain"])
    assert torch.equal(generate(["plain", "blocks"]), expected)
    assert len(bd.reports(model)) == graphs


def test_a_thread_that_compiles_sends_no_other_past_the_lock(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's flag is one for all threads: a forward that takes it for its own would run beside others."""
    model, adapters = served
    ran: list[bool] = []
    run = type(model)._run

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(True)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "_run", seen)
    with torch.no_grad(), adapters.use(None):
        before = model(IDS).logits
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        during = model(IDS).logits
    assert len(ran) == 2
    assert torch.equal(before, during)


def test_a_task_that_outlives_its_block_is_refused(served: tuple[Any, Any], reference: Reference) -> None:
    """As `asyncio.create_task` and `to_thread` copy it: the slot may be another adapter's by then."""
    model, adapters = served
    with adapters.use("plain"):
        task = copy_context()
        inside = task.run(logits, model)
    assert relative_error(inside, reference.logits(IDS, ["plain", "plain"])) < TOLERANCE, "the twin: it is open"
    with pytest.raises(bd.ConfigError, match=r"inside an `adapters\.use` block, which has ended"):
        task.run(logits, model)
    assert relative_error(logits(model), reference.logits(IDS, [None, None])) < TOLERANCE


def test_generators_that_are_read_in_turn_are_noticed(served: tuple[Any, Any], reference: Reference) -> None:
    """The innermost block counts, whose ever it is; who ends first is told, and nothing is left behind."""
    model, adapters = served

    def steps(name: str) -> Iterator[torch.Tensor]:
        with adapters.use(name):
            while True:
                yield logits(model)

    first, second = steps("plain"), steps("blocks")
    next(first)
    next(second)
    assert relative_error(next(first), reference.logits(IDS, ["blocks", "blocks"])) < TOLERANCE
    with pytest.raises(bd.ConfigError, match="ends before one that was entered inside of it"):
        first.close()  # type: ignore[attr-defined]  # a generator
    second.close()  # type: ignore[attr-defined]
    assert relative_error(logits(model), reference.logits(IDS, [None, None])) < TOLERANCE


def test_a_block_may_end_in_another_task(served: tuple[Any, Any]) -> None:
    """As generators do whose reader has gone: nothing of it is set there."""
    model, adapters = served
    block = adapters.use("plain")
    copy_context().run(block.__enter__)
    block.__exit__(None, None, None)
    logits(model)
    assert not model.bdlora._num_choices
