"""Recorded decode steps: equal to plain ones, whatever of their inputs changes; a stand-in records on the CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import CausalLMOutputWithPast

import bdlora_compile as bd
from bdlora_compile import backend, known_steps
from bdlora_compile.ir import Captured
from bdlora_compile.mutation import argument_indices, buffer_arguments, mutated_arguments
from bdlora_compile.runtime import program, step_graphs
from bdlora_compile.runtime.cache import CacheShape, LocalCache
from bdlora_compile.runtime.step_graphs import StepGraphs
from tests.api.conftest import Files, files  # noqa: F401  # a fixture

STEPS = 4


class StandIn:
    """Records as CUDA does: nothing is computed when it records, and a replay reads and writes the same tensors."""

    def __init__(self) -> None:
        self.written: list[torch.Tensor] = []

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        before = [tensor.clone() for tensor in self.written]
        results = run()
        for tensor, value in zip(self.written, before, strict=True):
            tensor.copy_(value)

        def replay() -> None:
            for own, value in zip(tree_leaves(results), tree_leaves(run()), strict=True):
                if isinstance(own, torch.Tensor):
                    own.copy_(value)

        return replay, results


def add_up(args: Sequence[Any]) -> tuple[torch.Tensor]:
    """Adds x to the total in place; the argument in the middle is never read."""
    x, _, total = args
    return (total.add_(x) * 2,)


@pytest.fixture
def steps() -> StepGraphs:
    return StepGraphs(frozenset({0, 2}), frozenset({2}), StandIn, limit=2)


def run(steps: StepGraphs, x: float, total: torch.Tensor, variant: bool = True) -> float:
    steps._recorder.written = [total]  # type: ignore[attr-defined]  # the stand-in's
    (result,) = steps.run(variant, (torch.tensor([x]), object(), total), add_up)
    return float(result.item())


def test_replays_read_new_arguments(steps: StepGraphs) -> None:
    total = torch.zeros(1)
    assert [run(steps, x, total) for x in (1.0, 2.0, 3.0, 4.0)] == [2.0, 6.0, 12.0, 20.0]
    assert (steps.stats.plain, steps.stats.recorded, steps.stats.replayed) == (1, 1, 3)


def test_another_tensor_written_to_is_another_step(steps: StepGraphs) -> None:
    first, second = torch.zeros(1), torch.full((1,), 10.0)
    for _ in range(3):
        run(steps, 1.0, first)
    assert run(steps, 1.0, second) == 22.0
    assert run(steps, 1.0, first) == 8.0
    assert steps.stats.recorded == 1, "the second tensor was seen once"


def test_results_outlive_the_next_step(steps: StepGraphs) -> None:
    total = torch.zeros(1)
    run(steps, 1.0, total)
    kept = steps.run(True, (torch.ones(1), None, total), add_up)[0]
    before = kept.clone()
    steps.run(True, (torch.ones(1), None, total), add_up)
    assert torch.equal(kept, before)


def test_variants_are_apart(steps: StepGraphs) -> None:
    total = torch.zeros(1)
    for variant in (True, False, True, False):
        run(steps, 1.0, total, variant)
    assert steps.stats.recorded == 2
    assert steps.stats.plain == 2


def test_the_oldest_of_too_many_goes(steps: StepGraphs) -> None:
    totals = [torch.zeros(1) for _ in range(3)]
    for total in totals:
        run(steps, 1.0, total)
        run(steps, 1.0, total)
    run(steps, 1.0, totals[0])
    assert steps.stats.plain == 4, "the first was forgotten, hence seen anew"


def test_what_is_forgotten_is_recorded_anew(steps: StepGraphs) -> None:
    """By another recorder: nothing of the first is left, which would keep its memory."""
    total = torch.zeros(1)
    first = steps._recorder
    assert [run(steps, 1.0, total) for _ in range(3)] == [2.0, 4.0, 6.0]
    steps.forget()
    assert not steps._recorded
    assert steps._recorder is not first
    assert [run(steps, 1.0, total) for _ in range(3)] == [8.0, 10.0, 12.0]
    assert (steps.stats.plain, steps.stats.recorded, steps.stats.replayed) == (2, 2, 4)


def test_a_variant_that_is_refused_runs_plain(steps: StepGraphs) -> None:
    total = torch.zeros(1)
    steps.refuse(True, "it asks the GPU")
    assert [run(steps, 1.0, total) for _ in range(3)] == [2.0, 4.0, 6.0]
    assert [run(steps, 1.0, total, variant=False) for _ in range(3)] == [8.0, 10.0, 12.0]
    assert (steps.stats.recorded, steps.stats.plain) == (1, 4)
    assert "refused: it asks the GPU" in steps.stats.text()


def test_large_results_are_not_kept(steps: StepGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.zeros(1)
    monkeypatch.setattr(step_graphs, "_RESULT_BYTES", 3)
    assert [run(steps, 1.0, total) for _ in range(3)] == [2.0, 4.0, 6.0]
    assert (steps.stats.recorded, steps.stats.plain) == (0, 3)
    monkeypatch.setattr(step_graphs, "_RESULT_BYTES", 4)
    assert [run(steps, 1.0, total, variant=False) for _ in range(2)] == [8.0, 10.0]
    assert steps.stats.recorded == 1


def test_forwards_seen_once_push_no_recorded_one_out(steps: StepGraphs) -> None:
    total = torch.zeros(1)
    run(steps, 1.0, total)
    run(steps, 1.0, total)
    for size in range(2, 2000):
        steps.run(True, (torch.ones(size), None, torch.zeros(size)), add_up)
    run(steps, 1.0, total)
    assert (steps.stats.recorded, steps.stats.replayed) == (1, 2)
    assert len(steps._seen) <= 1024


def test_expanded_arguments_are_copied_once() -> None:
    """As positions of a prompt are, made for one row and expanded: memory that several elements share."""
    steps = StepGraphs(frozenset({0, 1}), frozenset({1}), StandIn)
    total = torch.zeros(3, 4)
    steps._recorder.written = [total]  # type: ignore[attr-defined]
    for number in (1.0, 2.0, 3.0):
        x = torch.arange(4.0).add(number).expand(3, 4)
        assert torch.equal(steps.run(True, (x, total), add_two)[0], total)
    assert torch.equal(total, (3 * torch.arange(4.0) + 6).expand(3, 4))
    assert steps.stats.replayed == 2


def add_two(args: Sequence[Any]) -> tuple[torch.Tensor]:
    x, total = args
    return (total.add_(x).clone(),)


def test_what_cannot_be_recorded_runs_plain_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Callable[[], Any]) -> Any:
        try:
            raise ValueError("a value is read by the host\nmore")
        finally:
            # As CUDA does on the way out of a recording that was broken off.
            raise RuntimeError("operation failed due to a previous error during capture")

    steps = StepGraphs(frozenset({0, 2}), frozenset({2}), lambda: refuse)
    total = torch.zeros(1)
    found = [float(steps.run(True, (torch.ones(1), None, total), add_up)[0]) for _ in range(3)]
    assert found == [2.0, 4.0, 6.0], "every step ran once"
    assert steps.stats.refusals == ("ValueError: a value is read by the host",), "and was tried once"
    assert "cannot be recorded: a value is read" in caplog.text
    assert "refused: ValueError: a value is read" in steps.stats.text()


def test_a_forward_that_the_caller_records_is_not_replayed(
    files: Files,  # noqa: F811
    with_stand_in: list[StepGraphs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replay inside a recording is an error of CUDA's."""
    model, _ = bd.load(files.model, dtype=torch.float64, device="cpu")
    model.compile(backend="bdlora")
    cache = bd.make_cache(model, 2, 16)
    with torch.no_grad():
        for is_captured in (False, True, True):
            for steps in with_stand_in:
                steps._recorder.written = [cache.store, cache.lengths]  # type: ignore[attr-defined]
            monkeypatch.setattr(program, "_is_captured_by_caller", lambda answer=is_captured: answer)
            model(input_ids=torch.ones(2, 1, dtype=torch.int64), past_key_values=cache)
    (steps,) = with_stand_in
    assert (steps.stats.plain, steps.stats.recorded, steps.stats.replayed) == (1, 0, 0)


@pytest.fixture
def with_stand_in(monkeypatch: pytest.MonkeyPatch) -> list[StepGraphs]:
    """Every program gets step graphs with a stand-in; the list takes them in the order of compilation."""
    made: list[StepGraphs] = []

    def step_graphs(captured: Captured, *_: object) -> StepGraphs:
        in_place = mutated_arguments(captured) | buffer_arguments(captured)
        made.append(StepGraphs(argument_indices(captured), in_place, StandIn))
        return made[-1]

    monkeypatch.setattr(backend, "_step_graphs", step_graphs)
    torch._dynamo.reset()
    return made


PROMPT = torch.tensor([[5, 9, 33], [8, 8, 100]])


def decode(model: Any, adapters: Any, graphs: list[StepGraphs], prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    """Logits of a prompt and of some tokens after it; the rows' adapters change on the way."""
    cache = bd.make_cache(model, 2, 16)
    with torch.no_grad():
        for steps in graphs:
            steps._recorder.written = [cache.store, cache.lengths]  # type: ignore[attr-defined]
        logits = [model(prompt, past_key_values=cache).logits[:, -1:]]
        for step in range(STEPS):
            for steps in graphs:
                steps._recorder.written = [cache.store, cache.lengths]  # type: ignore[attr-defined]
            with adapters.use(["blocks", "plain"] if step % 2 else [None, "blocks"]):
                logits.append(model(logits[-1].argmax(-1), past_key_values=cache).logits)
    return torch.cat(logits, 1)


def test_a_model_decodes_alike(
    files: Files,  # noqa: F811
    with_stand_in: list[StepGraphs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replayed with other tokens and other adapters; a cache's place, forgotten, would show in the second row."""
    options: dict[str, Any] = {"adapters": files.adapters, "dtype": torch.float64, "device": "cpu"}
    model, adapters = bd.load(files.model, **options)
    model.compile(backend="bdlora")
    found = decode(model, adapters, with_stand_in)
    decoding = with_stand_in[-1].stats
    assert (decoding.recorded, decoding.replayed) == (1, STEPS - 1)
    assert "CUDA graphs: 1 recorded" in bd.reports(model)[-1].summary()
    (recorded,) = with_stand_in[-1]._recorded.values()
    kinds = [kept.own.dtype for kept in recorded.inputs.values()]
    assert kinds == [torch.int64] * 2, "tokens and where rows begin are copied, one launch; no buffer of the model"

    bd.release_graphs(model)
    assert not any(steps._recorded for steps in with_stand_in)
    assert torch.equal(found, decode(model, adapters, with_stand_in)), "recorded anew"
    assert decoding.recorded == 2

    for steps in with_stand_in:
        steps._recorded.clear()
        monkeypatch.setattr(steps, "_may_record", lambda key: False)
    assert torch.equal(found, decode(model, adapters, with_stand_in)), "the same graph, operator by operator"

    # Sabotage: an address left out of what a step is known by.
    monkeypatch.undo()
    for steps in with_stand_in:
        steps._arguments = [(index, False) for index, _ in steps._arguments]
    assert not torch.equal(found, decode(model, adapters, with_stand_in))


def test_known_steps_pass_dynamo_by(files: Files, with_stand_in: list[StepGraphs], monkeypatch: Any) -> None:  # noqa: F811
    """From the second step on the program is called directly; what a graph depends on, changed, asks Dynamo."""
    options: dict[str, Any] = {"adapters": files.adapters, "dtype": torch.float64, "device": "cpu"}
    model, adapters = bd.load(files.model, **options)
    model.compile(backend="bdlora")
    asked: list[int] = []
    compiled = type(model)._call_compiled

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return compiled(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "_call_compiled", spy)
    found = decode(model, adapters, with_stand_in)
    assert len(asked) == 2, "the prompt and the first step"
    assert torch.equal(found, decode(model, adapters, with_stand_in)), "another cache"
    assert len(asked) == 2, "the same shapes"
    decode(model, adapters, with_stand_in, prompt=torch.tensor([[5, 9], [8, 8]]))
    assert len(asked) == 3, "a prompt of another length, no new step"

    cache, token = bd.make_cache(model, 2, 16), torch.tensor([[5], [6]])
    assert_parts_of_prompts_are_replayed(model, cache, with_stand_in)
    cache.reset()
    for steps in with_stand_in:
        steps._recorder.written = [cache.store, cache.lengths]  # type: ignore[attr-defined]
    with torch.no_grad():
        output = model(input_ids=token, past_key_values=cache)
        assert len(asked) == 3
        assert model.bdlora.last_step is None, "results are the caller's alone"
        assert cache.lengths.tolist() == [1, 1]
        assert output.logits.shape == (2, 1, 128)
        monkeypatch.setattr(model.config, "output_hidden_states", True)
        assert model(input_ids=token, past_key_values=cache).hidden_states is not None, "the configuration changed"
        assert len(asked) == 4
        monkeypatch.undo()
    model.compile(backend="bdlora")
    assert not model.bdlora_known_steps._steps


@pytest.mark.parametrize("has_cache", [False, True])
def test_a_known_step_gives_what_transformers_would(has_cache: bool) -> None:
    """Made without the class's constructor: fields, keys and order are equal, and it can be assigned to."""
    logits = torch.ones(2, 1, 3)
    shape = CacheShape(num_layers=1, local_heads=1, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))
    cache = LocalCache(shape, batch=2, length=8) if has_cache else None
    found, expected = (make(logits, cache) for make in (known_steps._output, by_constructor))
    assert type(found) is type(expected)
    assert vars(found) == vars(expected)
    assert [*found.items()] == [*expected.items()]
    assert all(own is other for own, other in zip(found.to_tuple(), expected.to_tuple(), strict=True))
    assert all(own is other for own, other in zip(tree_leaves(found), tree_leaves(expected), strict=True))
    found.loss = torch.zeros(())
    assert found["loss"] is found.loss


def by_constructor(logits: torch.Tensor, cache: LocalCache | None) -> CausalLMOutputWithPast:
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def assert_parts_of_prompts_are_replayed(model: Any, cache: Any, graphs: list[StepGraphs]) -> None:
    """Parts of one size in one cache, wherever in the prompt: as an engine sends them."""
    for steps in graphs:
        steps._recorder.written = [cache.store, cache.lengths]  # type: ignore[attr-defined]
    before, parts = graphs[0].stats.replayed, torch.arange(12).view(2, 2, 3)
    found = []
    for _ in range(2):
        cache.reset()
        with torch.no_grad():
            found.append([model(input_ids=part, past_key_values=cache).logits for part in parts])
    assert graphs[0].stats.replayed == before + 4, "all: a cache that has ended had parts of this size, and lay here"
    for first, again in zip(*found, strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(*found[0])


def test_options_that_need_a_gpu_say_so(files: Files) -> None:  # noqa: F811
    torch._dynamo.reset()
    model, _ = bd.load(files.model, device="cpu")
    for options in ({"mode": "reduce-overhead"}, {"options": {"cuda_graphs": True}}):
        model.compile(backend="bdlora", **options)
        with pytest.raises(bd.ConfigError, match="a model on CUDA"):
            model(torch.tensor([[1, 2]]))
    model.compile(backend="bdlora", mode="max-autotune")
    with pytest.raises(bd.ConfigError, match="reduce-overhead"):
        model(torch.tensor([[1, 2]]))
