"""What the benchmark of decode steps makes of a profile, of reports and of logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bdlora_compile as bd
from bdlora_compile.census import number_of
from benchmarks.decode.pricing import step_census
from benchmarks.decode.reference import Expected
from benchmarks.decode.timing import Span, behind_first, exclusive
from benchmarks.plot_decode import fitted
from tests.models import ModelSpec, save_model

GEMM, LORA, NORM = "nvjet_sm90_tst_64x16", "delta_tokens", "all_reduce_add_norm_rows"


def test_a_moment_counts_once_and_for_what_hides_the_rest() -> None:
    """LoRA beside a product is hidden, what is left of it behind the product is not; nothing runs from 8 to 9."""
    spans = [Span(GEMM, 0, 4), Span(LORA, 1, 3), Span(LORA, 3, 6), Span(NORM, 5, 8), Span("copy", 9, 10)]
    parts = exclusive(spans, 1)
    assert parts == {"GEMM": 4, "LoRA": 1, "attention": 0, "collectives": 3, "rest": 1}
    assert exclusive(spans, 2) == {name: value / 2 for name, value in parts.items()}


def test_equal_kinds_beside_each_other_count_once() -> None:
    spans = [Span(GEMM, 0, 4), Span(GEMM, 2, 5), Span(GEMM, 5, 6)]
    assert exclusive(spans, 1)["GEMM"] == 6


def test_waits_of_the_first_step_do_not_count() -> None:
    """Its ranks begin one after the other."""
    step = [Span(GEMM, 0, 4), Span(NORM, 4, 5)]
    waits = [Span(GEMM, 0, 4), Span(NORM, 4, 50)]
    later = [Span(name, start + at, end + at) for at in (50, 55) for name, start, end in step]
    assert behind_first([*later, *waits], 3) == later
    assert exclusive(behind_first([*later, *waits], 3), 2)["collectives"] == 1


def test_pictures_show_the_step_that_was_timed() -> None:
    """What a profile adds by ranks that wait for one another is left out; what it does not explain is not made up."""
    slowed = fitted({"GEMM": 2.0, "collectives": 1.5, "idle": 0.0}, 3.0, 3.25)
    assert slowed == {"GEMM": 2.0, "collectives": 1.0, "idle": 0.0, "waiting for the host": 0.25}
    exact = {"GEMM": 2.0, "collectives": 0.5, "idle": 0.5}
    assert fitted(exact, 3.0, 3.0) == {**exact, "waiting for the host": 0.0}
    assert fitted({}, 3.0, 3.5) == {"waiting for the host": 0.5}, "a run that was cut off has rows without a profile"


def test_profiles_say_when_what_ran_where() -> None:
    """What is read of torch's events is there."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        torch.ones(4).add(1)
    events = [event for event in found.events() if event.device_type == DeviceType.CPU]
    assert events
    assert all(event.name and event.time_range.end >= event.time_range.start for event in events)


def logits(*rows: list[float]) -> torch.Tensor:
    """[rows, 1, vocabulary]."""
    return torch.tensor(rows)[:, None]


def expected() -> Expected:
    """Two rows; rounding moves a logit by 0.01, another adapter by far more."""
    exact = logits([1.0, 0.5, 0.0], [0.0, 0.995, 1.0])
    return Expected(exact, exact + logits([0.01, 0, 0], [0, 0.01, 0]), exact.roll(1, dims=2), 2.0**-9)


def test_logits_within_rounding_are_accepted() -> None:
    """So is the other of two tokens whose logits are as far apart as rounding moves them."""
    check = expected().check(logits([1.0, 0.51, 0.0], [0.0, 1.0, 0.998]))
    check.verify()
    assert (check.equal, check.tokens) == (1, 2)
    assert check.error == pytest.approx(0.01)
    assert check.gap == pytest.approx(0.005)


def test_each_copy_of_the_rows_is_compared() -> None:
    """A single one that is off is noticed."""
    right = logits([1.0, 0.51, 0.0], [0.0, 1.0, 0.998]).repeat(3, 1, 1)
    check = expected().check(right)
    check.verify()
    assert (check.equal, check.tokens) == (3, 6)
    right[4, 0, 2] += 0.5
    with pytest.raises(AssertionError, match="the logits are off"):
        expected().check(right).verify()


@pytest.mark.parametrize(
    ("column", "found", "said"),
    [
        (expected(), logits([1.0, 0.5, 0.05], [0.0, 0.995, 1.0]), "the logits are off"),
        (
            replace(
                expected(),
                exact=logits([1.0, 0.5, 0.0], [0.0, 0.98, 1.0]),
                rounded=logits([1.01, 0.5, 0.0], [0.0, 0.98, 1.0]),
            ),
            logits([1.0, 0.5, 0.0], [0.0, 0.995, 0.99]),
            "a greedy token is off",
        ),
        (
            replace(expected(), swapped=logits([1.0, 0.5, 0.0], [1.0, 0.0, 0.0])),
            logits([1.0, 0.5, 0.0], [0.0, 0.995, 1.0]),
            "other adapters would not be noticed",
        ),
    ],
    ids=["logits", "token", "adapter"],
)
def test_logits_that_are_off_are_refused(column: Expected, found: torch.Tensor, said: str) -> None:
    """Another logit; a token further behind than rounding moves logits; an adapter that does nothing."""
    with pytest.raises(AssertionError, match=said):
        column.check(found).verify()


def test_a_step_is_priced_by_its_own_graph(tmp_path: Path) -> None:
    """Not by the last one that was compiled: a graph of one row has the bytes of one row in it."""
    model: Any = bd.load(save_model(ModelSpec(layers=1), tmp_path / "model"), ranks=bd.Ranks.lockstep(2))[0]
    torch._dynamo.reset()
    model.compile(backend="bdlora")
    with torch.no_grad():
        for rows in (2, 3, 1):
            cache = bd.make_cache(model, rows, 8)
            model(torch.ones(rows, 1, dtype=torch.int64), past_key_values=cache)
    reports = bd.reports(model)
    sizes = [
        sum(number_of(entry.wire_bytes, rows, 1) for entry in step_census(reports, rows, with_lora=False).collectives)
        for rows in (6, 1)
    ]
    assert sizes[0] == 6 * sizes[1] > 0
    assert reports[-1].inputs[0] == "i64[1, 1]", "the last graph knows one row alone"
    with pytest.raises(LookupError, match="no graph is a step of 6 rows"):
        step_census(reports[:0], 6, with_lora=True)
