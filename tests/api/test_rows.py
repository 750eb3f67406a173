"""Rows of a batch that begin and end at different places: padded prompts, rows of one cache, and what is refused."""

from typing import Any

import pytest
import torch

import bdlora_compile as bd
from tests.api.conftest import Files
from tests.models import Reference, relative_error

TOLERANCE = 2e-6
"""As in tests/numerics/test_compiled.py."""
PROMPT = torch.tensor([[5, 9, 33, 71], [8, 8, 100, 4]])
NEXT = torch.tensor([[12], [77]])
ROWS: list[str | None] = ["blocks", None]
LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
ONE = torch.ones(2, 1, dtype=torch.int64)


@pytest.fixture(scope="module")
def served(files: Files) -> tuple[Any, Any]:
    """A compiled model in float64 on two ranks."""
    torch._dynamo.reset()
    model, adapters = bd.load(files.model, files.adapters, dtype=torch.float64, ranks=bd.Ranks.lockstep(2))
    model.compile(backend="bdlora")
    return model, adapters


@pytest.fixture(scope="module")
def reference(files: Files) -> Reference:
    """PEFT's own model."""
    return Reference(files.model, files.adapters, torch.float64)


def run(served: tuple[Any, Any], ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of a forward."""
    model, adapters = served
    with adapters.use(ROWS), torch.no_grad():
        logits: torch.Tensor = model(ids, **inputs).logits
    return logits


def test_left_padding_is_remembered_by_the_cache(served: tuple[Any, Any], reference: Reference) -> None:
    """The next token sees no padding, whether the mask comes along or not; without it the comparison fails."""
    expected = reference.logits(torch.cat([PROMPT, NEXT], 1), ROWS, torch.cat([LEFT, ONE], 1))
    for mask in (torch.cat([LEFT, ONE], 1), None):
        cache = bd.make_cache(served[0], 2, 16)
        first = run(served, PROMPT, attention_mask=LEFT, past_key_values=cache)
        assert relative_error(first[LEFT.bool()], expected[:, :4][LEFT.bool()]) < TOLERANCE
        assert cache.starts.tolist() == [0, 2]
        following = run(served, NEXT, attention_mask=mask, past_key_values=cache)
        assert relative_error(following, expected[:, 4:]) < TOLERANCE
    twin = bd.make_cache(served[0], 2, 16)
    run(served, PROMPT, attention_mask=LEFT, past_key_values=twin)
    twin.starts.zero_()
    assert relative_error(run(served, NEXT, past_key_values=twin), expected[:, 4:]) > 1e-3
    twin.reset()
    assert twin.starts.tolist() == [0, 0]


def test_rows_of_different_length_share_a_cache(served: tuple[Any, Any], reference: Reference) -> None:
    """No mask, positions of each row's own; what lies behind a row's tokens may be NaN."""
    cache = bd.make_cache(served[0], 2, 16)
    run(served, PROMPT, past_key_values=cache)
    cache.lengths.copy_(torch.tensor([4, 2]))
    for store in (cache.store, *cache.store.bdlora_peers):  # type: ignore[attr-defined]  # every rank's
        store[:, :, 1, 2:] = float("nan")
    found = run(served, NEXT, past_key_values=cache, position_ids=torch.tensor([[4], [2]]))
    long = reference.logits(torch.cat([PROMPT, NEXT], 1), ROWS)[0, -1]
    short = reference.logits(torch.cat([PROMPT[:, :2], NEXT], 1), ROWS)[1, -1]
    assert relative_error(found[:, 0], torch.stack([long, short])) < TOLERANCE
    assert cache.lengths.tolist() == [5, 3]
    assert relative_error(found[1, 0], reference.logits(torch.cat([PROMPT, NEXT], 1), ROWS)[1, -1]) > 1e-3


def test_an_idle_row_harms_no_other(served: tuple[Any, Any], reference: Reference) -> None:
    """A row of length 0 whose place holds NaN: its own output is finite, the other row's right."""
    cache = bd.make_cache(served[0], 2, 16)
    run(served, PROMPT, past_key_values=cache)
    cache.lengths[1] = 0
    for store in (cache.store, *cache.store.bdlora_peers):  # type: ignore[attr-defined]  # every rank's
        store[:, :, 1] = float("nan")
    found = run(served, NEXT, past_key_values=cache, position_ids=torch.tensor([[4], [0]]))
    assert relative_error(found[0], reference.logits(torch.cat([PROMPT, NEXT], 1), ROWS)[0, 4:]) < TOLERANCE
    assert found.isfinite().all()


def test_a_prompt_in_chunks(served: tuple[Any, Any], reference: Reference) -> None:
    """The second chunk brings the whole mask; a row may be all padding in the first."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    ids = torch.cat([PROMPT, PROMPT[:, :2]], 1)
    cache = bd.make_cache(served[0], 2, 16)
    run(served, ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    found = run(served, ids[:, 4:], attention_mask=mask, past_key_values=cache)
    assert relative_error(found[:, -1], reference.logits(ids, ROWS, mask)[:, -1]) < TOLERANCE


def test_padding_without_a_cache(served: tuple[Any, Any], reference: Reference) -> None:
    """At either end, or none; arguments may come by place."""
    both = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    for mask in (LEFT, both, None):
        found = run(served, PROMPT, attention_mask=mask)
        own = torch.ones_like(PROMPT).bool() if mask is None else mask.bool()
        assert relative_error(found[own], reference.logits(PROMPT, ROWS, mask)[own]) < TOLERANCE
    model, adapters = served
    with adapters.use(ROWS), torch.no_grad():
        assert torch.equal(model(PROMPT, LEFT).logits, run(served, PROMPT, attention_mask=LEFT))


def test_masks_that_no_row_can_have_are_refused(served: tuple[Any, Any]) -> None:
    """Holes, padding at the right of a cache, a mask of another size: named, and the cache is as it was."""
    holes = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    with pytest.raises(bd.ConfigError, match=r"attention_mask, row 1: found 1011"):
        run(served, PROMPT, attention_mask=holes)
    cache = bd.make_cache(served[0], 2, 16)
    for mask, message in (
        (holes, "row 1: found 1011, expected zeros at the left only"),
        (LEFT.flip(1), "row 1: found 1100, .*a cache has no holes"),
        (LEFT[:, 1:], r"found \[2, 3\], expected \[2, 4\]: the 0 tokens of the cache and 4 new ones"),
    ):
        with pytest.raises(bd.ConfigError, match=message):
            run(served, PROMPT, attention_mask=mask, past_key_values=cache)
    assert cache.lengths.tolist() == cache.starts.tolist() == [0, 0]


def test_a_mask_of_the_callers_own(served: tuple[Any, Any], reference: Reference) -> None:
    """[B, 1, S, L] says what each query sees, holes included; the report says that all keys were read under it."""
    model, _ = served
    hole = torch.tensor([True, False, True, True])
    sees = torch.ones(4, 4, dtype=torch.bool).tril() & hole
    sees[1, 1] = True
    inputs = {"attention_mask": sees.expand(2, 1, 4, 4), "position_ids": torch.arange(4).expand(2, 4)}
    run(served, PROMPT)
    found = run(served, PROMPT, **inputs)
    with torch.no_grad(), reference.model.disable_adapter():
        expected = reference.model(PROMPT, **inputs, use_cache=False).logits
    assert relative_error(found[1], expected[1]) < TOLERANCE
    assert relative_error(found[1, 3], reference.logits(PROMPT, ROWS)[1, 3]) > 1e-3
    told = [report.attention for report in bd.reports(model)]
    assert any("all keys under a whole mask in 1 layer" in text for text in told)
    assert any("each row's own keys in 1 layer" in text for text in told), "without a mask"
