"""Caches: this rank's heads only, of fixed length; a user's cache of all heads is refused or gathered for."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import bdlora_compile as bd
from bdlora_compile.ir import Origin
from tests.api.conftest import Files
from tests.models import Reference, relative_error

TOLERANCE = 2e-6
"""As in tests/numerics/test_compiled.py."""
PROMPT = torch.tensor([[5, 9, 33, 71], [8, 8, 100, 4]])
NEXT = torch.tensor([[12], [77]])
ROWS: list[str | None] = ["blocks", None]


def loaded(files: Files, degree: int = 2, **options: Any) -> tuple[Any, Any]:
    """A compiled model in float64."""
    torch._dynamo.reset()
    model, adapters = bd.load(
        files.model, files.adapters, dtype=torch.float64, ranks=bd.Ranks.lockstep(degree), **options
    )
    model.compile(backend="bdlora")
    return model, adapters


@pytest.fixture(scope="module")
def served(files: Files) -> tuple[Any, Any]:
    """One strict model for the tests that do not change it."""
    return loaded(files)


def reference(files: Files) -> torch.Tensor:
    """Logits of prompt and next token together."""
    return Reference(files.model, files.adapters, torch.float64).logits(torch.cat([PROMPT, NEXT], 1), ROWS)


def two_steps(model: Any, adapters: Any, cache: Any) -> torch.Tensor:
    """Logits of the prompt and of the next token, through a cache."""
    with adapters.use(ROWS), torch.no_grad():
        first = model(PROMPT, past_key_values=cache, use_cache=True).logits
        return torch.cat([first, model(NEXT, past_key_values=cache, use_cache=True).logits], dim=1)


def test_local_cache_holds_own_heads(files: Files, served: tuple[Any, Any]) -> None:
    """Initialised, of fixed length, with a rank's heads; two forwards through it equal one without."""
    model, adapters = served
    cache = bd.make_cache(model, 2, 16)
    assert cache.layers[0].keys.shape == (2, 1, 16, 8), "2 kv heads on 2 ranks"
    assert cache.is_initialized
    assert cache.get_max_length() == 16
    assert not cache.layers[0].keys.any()
    assert relative_error(two_steps(model, adapters, cache), reference(files)) < TOLERANCE
    assert cache.lengths.tolist() == [5, 5]
    assert cache.layers[0].keys[:, :, :5].any()
    assert not cache.layers[0].keys[:, :, 5:].any()


def test_reset_forgets(files: Files, served: tuple[Any, Any]) -> None:
    """After `reset` the cache serves another prompt as if new; without it the comparison fails."""
    model, adapters = served
    cache = bd.make_cache(model, 2, 16)
    two_steps(model, adapters, cache)
    assert relative_error(two_steps(model, adapters, cache), reference(files)) > 1e-3
    cache.reset()
    assert relative_error(two_steps(model, adapters, cache), reference(files)) < TOLERANCE


def test_tokens_past_the_length_are_refused(files: Files, served: tuple[Any, Any]) -> None:
    """The error says how long the cache is; the cache is as it was."""
    model, adapters = served
    cache = bd.make_cache(model, 2, 4)
    with adapters.use(ROWS), torch.no_grad():
        model(PROMPT, past_key_values=cache, use_cache=True)
        with pytest.raises(bd.ConfigError, match=r"4 tokens of 4 in use.*5 tokens.*make_cache"):
            model(NEXT, past_key_values=cache, use_cache=True)
    assert cache.lengths.tolist() == [4, 4]


def test_a_refused_forward_takes_no_room(files: Files, served: tuple[Any, Any]) -> None:
    """A wrong choice of adapters raises before anything is written; the cache serves the next call as if new."""
    model, adapters = served
    cache = bd.make_cache(model, 2, 5)
    with adapters.use(["plain"]), torch.no_grad(), pytest.raises(bd.ConfigError, match=r"adapters\.use"):
        model(PROMPT, past_key_values=cache, use_cache=True)
    assert relative_error(two_steps(model, adapters, cache), reference(files)) < TOLERANCE


def test_another_batch_is_refused(served: tuple[Any, Any]) -> None:
    """A cache of three rows cannot serve two."""
    model, adapters = served
    with (
        adapters.use(ROWS),
        torch.no_grad(),
        pytest.raises(bd.ConfigError, match=r"3 rows.*2 rows.*make_cache"),
    ):
        model(PROMPT, past_key_values=bd.make_cache(model, 3, 16), use_cache=True)


def test_cache_of_another_model_is_refused(files: Files, served: tuple[Any, Any]) -> None:
    """A cache made for another number of ranks has other heads."""
    whole, _ = bd.load(files.model, dtype=torch.float64)
    model, adapters = served
    with adapters.use(ROWS), torch.no_grad(), pytest.raises(bd.ConfigError, match="make_cache"):
        model(PROMPT, past_key_values=bd.make_cache(whole, 2, 16), use_cache=True)


def test_plain_model_gets_no_cache(files: Files) -> None:
    """`make_cache` wants a loaded model."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(bd.ConfigError, match=r"bdlora_compile\.load"):
        bd.make_cache(AutoModelForCausalLM.from_pretrained(files.model), 1, 8)


def test_dynamic_cache_is_refused_in_strict_mode(served: tuple[Any, Any]) -> None:
    """The error names our cache."""
    model, adapters = served
    torch._dynamo.reset()
    with adapters.use(ROWS), torch.no_grad(), pytest.raises(bd.PlacementError, match="make_cache") as caught:
        model(PROMPT, past_key_values=DynamicCache(), use_cache=True)
    assert "strict=False" in str(caught.value)


def test_dynamic_cache_is_right_through_reported_gathers(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    """Not strict: right, the log and the report name each gather, the cache holds all heads."""
    model, adapters = loaded(files, strict=False)
    cache = DynamicCache()
    with caplog.at_level("WARNING", logger="bdlora_compile"):
        found = two_steps(model, adapters, cache)
    assert relative_error(found, reference(files)) < TOLERANCE
    assert cache.layers[0].keys.shape[1] == 2
    for report in bd.reports(model):
        assert report.stages[-1].census.total(Origin.FALLBACK) > 0
        assert report.stage("partition").stats.refusals
    assert "gather that nobody asked for" in caplog.text


def test_other_cache_implementations_are_refused(served: tuple[Any, Any]) -> None:
    """`generate` names the option."""
    model, _ = served
    with pytest.raises(bd.ConfigError, match="cache_implementation"):
        model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), cache_implementation="static", max_new_tokens=1)


def test_a_forward_that_fails_late_leaves_its_rows_as_they_were(
    files: Files, served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are the likeliest thing not to fit, and lengths are written before; the same again is right."""
    model, adapters = served
    cache = bd.make_cache(model, 2, 16)
    program = type(model.bdlora).select

    def forward_and_fail(*args: Any) -> bool:
        cache.lengths.add_(PROMPT.shape[1])
        raise torch.OutOfMemoryError("logits")

    monkeypatch.setattr(type(model.bdlora), "select", forward_and_fail)
    with pytest.raises(torch.OutOfMemoryError):
        two_steps(model, adapters, cache)
    monkeypatch.setattr(type(model.bdlora), "select", program)
    assert cache.lengths.tolist() == [0, 0]
    assert relative_error(two_steps(model, adapters, cache), reference(files)) < TOLERANCE


def test_padding_is_forgotten_with_the_tokens_before_it(served: tuple[Any, Any]) -> None:
    """Rows that are emptied after a padded batch hold no padding; those that keep it keep it."""
    model, adapters = served
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache, fresh = bd.make_cache(model, 2, 16), bd.make_cache(model, 2, 16)
    with adapters.use(ROWS), torch.no_grad():
        model(PROMPT, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache.set_lengths([3, 3])
        assert cache.starts.tolist() == [2, 0]
        cache.set_lengths([0, 0])
        found, right = (model(PROMPT, past_key_values=one, use_cache=True).logits for one in (cache, fresh))
    assert torch.equal(found, right)
