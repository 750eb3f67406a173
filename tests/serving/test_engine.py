"""Requests that join and leave a running batch get the tokens that PEFT gives them alone."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import bdlora_compile as bd
from bdlora_compile.runtime.cache import LocalCache
from bdlora_compile.serving import batch
from bdlora_compile.serving.batch import AS_CHOSEN, Batch
from bdlora_compile.serving.engine import Engine
from bdlora_compile.serving.requests import Finished, Request, SamplingParams, Token
from bdlora_compile.serving.stream import Stream
from tests.serving.conftest import EOS, World

COUNT = 8
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
PROMPTS: list[tuple[int, ...]] = [(5,), (5, 9), tuple(range(3, 33)), (7, 7, 7, 9, 100, 4)]


def mixed(world: World, count: int = 9) -> list[Request]:
    """Prompts of one token and of many, each adapter and none: more than there are rows, and slots in the pool."""
    names: list[str | None] = [*world.paths, None]
    return [Request(PROMPTS[index % 4], names[index % 5], GREEDY) for index in range(count)]


def wrong(world: World, engine: Engine, requests: list[Request]) -> int:
    """Requests whose tokens are not those that PEFT generates."""
    streams = [engine.submit(request) for request in requests]
    return sum(
        stream.result(60).ids != world.alone(request.prompt, request.adapter, COUNT)
        for request, stream in zip(requests, streams, strict=True)
    )


def test_tokens_equal_those_alone(engine: Engine, world: World) -> None:
    """Nine requests over three rows and two slots."""
    assert wrong(world, engine, mixed(world)) == 0


def test_events_of_a_request(engine: Engine, world: World) -> None:
    """Tokens and their texts, then the end with its usage and the version that was served."""
    stream = engine.submit(Request((5, 9), "a", GREEDY))
    completion = stream.result(30)
    assert completion.text == world.tokenizer.decode(completion.ids, skip_special_tokens=True)
    assert completion.finished.reason == "length"
    assert completion.finished.usage.prompt_tokens == 2
    assert completion.finished.usage.completion_tokens == COUNT
    assert completion.finished.waited_seconds is not None
    assert stream.adapter_version == world.adapters.version("a")


def test_the_host_reads_behind_where_the_device_does(
    engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that ends by its token, not by its length, runs once more then; it reads tokens that the host has not."""
    expected = world.alone((5, 9), "a", COUNT)
    monkeypatch.setattr(engine._running_scheduler(), "_eos", {expected[2]})
    read: list[int] = []
    decode = Batch.decode

    def watched(self: Batch, tokens: Sequence[int], *rest: Any) -> torch.Tensor:
        read.append(tokens[0])
        return decode(self, tokens, *rest)

    monkeypatch.setattr(Batch, "decode", watched)
    assert engine.submit(Request((5, 9), "a", SamplingParams(temperature=0, max_tokens=COUNT))).result(30).ids
    end = expected.index(expected[2])
    is_behind = vars(Batch)["runs_behind"]
    assert read == [9, *([AS_CHOSEN] * (end + 1) if is_behind else expected[:end])]


def test_a_long_prompt_goes_in_parts(unstarted: Callable[..., Engine], world: World) -> None:
    """Parts of four tokens, the last one a single token, while other rows decode."""
    with unstarted(prefill_chunk=4) as engine:
        requests = [Request(tuple(range(3, 3 + length)), "b", GREEDY) for length in (2, 6, 10, 33, 5)]
        assert wrong(world, engine, requests) == 0


def test_parts_of_few_sizes(unstarted: Callable[..., Engine], world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: what pads a part is neither seen nor kept."""
    monkeypatch.setattr(batch, "_part_step", lambda device: 8)
    sizes = set()
    run = Batch._run

    def seen(self: Batch, *args: Any, **inputs: Any) -> Any:
        sizes.add(inputs["input_ids"].shape[1])
        return run(self, *args, **inputs)

    monkeypatch.setattr(Batch, "_run", seen)
    with unstarted(prefill_chunk=16) as engine:
        requests = [Request(tuple(range(3, 3 + length)), "b", GREEDY) for length in (2, 6, 10, 33, 18)]
        assert wrong(world, engine, requests) == 0
    assert sizes == {1, 8, 16}


def test_one_row(unstarted: Callable[..., Engine], world: World) -> None:
    """A single row is served by the same graphs."""
    graphs = len(bd.reports(world.model))
    with unstarted(max_rows=1) as engine:
        assert wrong(world, engine, mixed(world, 3)) == 0
    assert len(bd.reports(world.model)) == graphs


@pytest.mark.parametrize("sabotage", ["rows swapped", "lengths off by one", "adapters swapped"])
def test_sabotage_is_seen(
    unstarted: Callable[..., Engine], world: World, monkeypatch: pytest.MonkeyPatch, sabotage: str
) -> None:
    """The comparison with PEFT fails where a row's keys, its length or its adapter is another's."""
    copy, decode = LocalCache.copy_tokens, Batch.decode
    with unstarted() as engine:
        if sabotage == "rows swapped":
            monkeypatch.setattr(LocalCache, "copy_tokens", lambda self, row, *rest: copy(self, (row + 1) % 3, *rest))
        elif sabotage == "lengths off by one":
            monkeypatch.setattr(
                Batch,
                "decode",
                lambda self, tokens, lengths, slots: decode(self, tokens, [n + 1 for n in lengths], slots),
            )
        else:
            monkeypatch.setattr(
                Batch, "decode", lambda self, tokens, lengths, slots: decode(self, tokens, lengths, slots[::-1])
            )
        assert wrong(world, engine, mixed(world, 6)) >= 2


def test_random_mixes(engine: Engine, world: World) -> None:
    """Requests arrive, end and are cancelled at random: what was generated is always the beginning of PEFT's."""
    draw = random.Random(3)
    names: list[str | None] = [*world.paths, None]
    live: list[Stream] = []
    done: list[Stream] = []
    for _ in range(60):
        if len(live) < 8:
            sampling = SamplingParams(temperature=0, max_tokens=draw.randint(1, COUNT), ignore_eos=True)
            live.append(engine.submit(Request(draw.choice(PROMPTS), draw.choice(names), sampling)))
        if draw.random() < 0.3:
            draw.choice(live).cancel()
        if draw.random() < 0.5:
            time.sleep(0.004)
        done += [stream for stream in live if stream.is_finished]
        live = [stream for stream in live if not stream.is_finished]
    reasons = set()
    for stream in [*done, *live]:
        completion, request = stream.result(30), stream.request
        reasons.add(completion.finished.reason)
        assert completion.finished.error is None
        assert completion.ids == world.alone(request.prompt, request.adapter, COUNT)[: len(completion.ids)]
        if completion.finished.reason == "length":
            assert len(completion.ids) == request.sampling.max_tokens
    assert reasons == {"length", "cancelled"}


def test_a_storm_of_cancels_leaves_nothing(engine: Engine, world: World) -> None:
    """From several threads, before, while and after they run; the engine serves on. The fixture looks for leaks."""

    def storm(seed: int) -> None:
        draw = random.Random(seed)
        for request in mixed(world, 15):
            with engine.submit(request) as stream:
                for _ in range(draw.randint(0, 3)):
                    next(iter(stream))
            stream.result(30)

    threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong(world, engine, mixed(world, 3)) == 0


def test_a_seed_gives_the_same_tokens_in_any_company(engine: Engine, world: World) -> None:
    """Alone, twice, and among others; another seed gives others."""

    def sampled(seed: int) -> Request:
        return Request((5, 9), "a", SamplingParams(max_tokens=COUNT, top_p=0.9, top_k=50, seed=seed, ignore_eos=True))

    alone = engine.submit(sampled(11)).result(30).ids
    company = [engine.submit(request) for request in (*mixed(world, 2), sampled(11), sampled(12), sampled(11))]
    _, _, first, other, last = [stream.result(30).ids for stream in company]
    assert first == last == alone
    assert other != alone


def test_logprobs_are_those_of_the_model(engine: Engine, world: World) -> None:
    """Against log_softmax of PEFT's eager logits, whatever the temperature; the likeliest first."""
    sampling = SamplingParams(max_tokens=4, temperature=0.3, seed=1, logprobs=3, ignore_eos=True)
    completion = engine.submit(Request((5, 9, 33), "b", sampling)).result(30)
    ids = torch.tensor([[5, 9, 33, *completion.ids]])
    logprobs = world.reference.logits(ids, ["b"])[0, 2:].log_softmax(-1)
    for place, token in enumerate(completion.tokens):
        assert token.logprob == pytest.approx(logprobs[place, token.id].item(), abs=1e-5)
        best = logprobs[place].topk(3)
        assert [id for id, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_stop_conditions(engine: Engine, world: World) -> None:
    """A stop text across tokens, a stop token, the model's own end, and the end of the row."""
    expected = world.alone((5, 9), "a", COUNT)
    text = world.tokenizer.decode(expected)
    stop = text[text.index("<", 1) - 1 :][:3]

    def run(**settings: object) -> tuple[str, Finished]:
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": COUNT, "ignore_eos": True} | settings)  # type: ignore[arg-type]
        completion = engine.submit(Request((5, 9), "a", sampling)).result(30)
        return completion.text, completion.finished

    shown, finished = run(stop=("never", stop))
    assert (shown, finished.reason, finished.stop) == (text[: text.index(stop)], "stop", stop)
    shown, finished = run(stop_token_ids=(expected[3],))
    assert (finished.reason, finished.stop) == ("stop", expected[3])
    before = expected[: expected.index(expected[3])]
    assert shown == world.tokenizer.decode(before), "what stops it is no part of it, token or text"
    assert finished.usage.completion_tokens == expected.index(expected[3]) + 1
    completion = engine.submit(Request(tuple(range(3, 49)), None, GREEDY)).result(30)
    assert (completion.finished.reason, len(completion.ids)) == ("length", 2), "48 tokens are a full row"


def test_the_end_of_sequence_token_ends(engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the model's generation config names, unless the request ignores it."""
    expected = world.alone((5, 9), "a", COUNT)
    scheduler = engine._running_scheduler()
    assert scheduler._eos == {EOS}
    monkeypatch.setattr(scheduler, "_eos", {expected[2]})
    sampling = SamplingParams(temperature=0, max_tokens=COUNT)
    completion = engine.submit(Request((5, 9), "a", sampling)).result(30)
    assert completion.ids == expected[: expected.index(expected[2]) + 1]
    assert (completion.finished.reason, completion.finished.stop) == ("stop", None)
    assert engine.submit(Request((5, 9), "a", GREEDY)).result(30).ids == expected


def test_streams_in_an_event_loop(engine: Engine, world: World) -> None:
    """Several readers at once; one that is cancelled cancels its request."""

    async def read(request: Request) -> tuple[int, ...]:
        with engine.submit(request) as stream:
            return tuple([event.id async for event in stream if isinstance(event, Token)])

    async def leave() -> Stream:
        stream = engine.submit(Request((5,), "a", SamplingParams(max_tokens=40, ignore_eos=True)))
        with stream:
            async for _ in stream:
                break
        return stream

    async def main() -> None:
        requests = mixed(world, 5)
        *found, left = await asyncio.gather(*(read(request) for request in requests), leave())
        assert found == [world.alone(request.prompt, request.adapter, COUNT) for request in requests]
        assert isinstance(left, Stream)
        assert (await asyncio.to_thread(left.result, 30)).finished.reason == "cancelled"

    asyncio.run(main())


def test_refusals(engine: Engine) -> None:
    """What cannot be served says so at once."""
    with pytest.raises(bd.UnknownAdapterError, match="nobody"):
        engine.submit(Request((5,), "nobody", GREEDY))
    for prompt, message in (((), "0 tokens"), (tuple([5] * 48), "48 tokens.*max_length"), ((5, 128), "vocabulary")):
        with pytest.raises(bd.RequestError, match=message):
            engine.submit(Request(prompt, None, GREEDY))


@pytest.mark.parametrize("sizes", [{"max_rows": 0}, {"max_length": 513}, {"prefill_chunk": 0}, {"max_waiting": 0}])
def test_sizes_out_of_range_are_refused(unstarted: Callable[..., Engine], sizes: dict[str, int]) -> None:
    """By name; the model has 512 positions."""
    with pytest.raises(bd.ConfigError, match=next(iter(sizes))):
        unstarted(**sizes)


@pytest.mark.parametrize(
    "settings", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1},
                 {"stop": ("",)}, {"logprobs": 21}, {"seed": 2**64}]
)  # fmt: skip
def test_parameters_out_of_range_are_refused(settings: dict[str, object]) -> None:
    """By name."""
    with pytest.raises(bd.RequestError, match=next(iter(settings))):
        SamplingParams(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"top_k": 2**70}, {"max_tokens": 2**70}, {"temperature": 5e-324}, {"temperature": 1e308},
                 {"top_p": 5e-324}, {"seed": -(2**63)}, {"stop_token_ids": (2**70, -5)}, {"stop": ("<" * 10_000,)},
                 {"logprobs": 20, "top_k": 3}]
)  # fmt: skip
def test_extreme_parameters_that_are_taken_are_served(engine: Engine, settings: dict[str, Any]) -> None:
    """None of them ends the engine, which would end the requests of all others."""
    sampling = SamplingParams(**{"max_tokens": 3, "ignore_eos": True, "seed": 1} | settings)
    stream = engine.submit(Request((5, 9), "a", sampling))
    for _ in range(3):
        assert isinstance(next(iter(stream)), Token)
    stream.cancel()
    assert stream.result(30).finished.error is None


def test_full_queues_refuse(unstarted: Callable[..., Engine]) -> None:
    """An adapter's own limit, then that of all; others are served meanwhile, and all end when the engine closes."""
    with unstarted(max_rows=1, max_waiting=3, max_waiting_per_adapter=2) as engine:
        long = SamplingParams(max_tokens=46, ignore_eos=True)
        streams = [engine.submit(Request((5,), "a", long))]
        next(iter(streams[0]))
        streams += [engine.submit(Request((5,), "a", long)) for _ in range(2)]
        with pytest.raises(bd.QueueFullError, match=r"adapter 'a'"):
            engine.submit(Request((5,), "a", long))
        streams.append(engine.submit(Request((5,), "b", long)))
        with pytest.raises(bd.QueueFullError, match="3 in all"):
            engine.submit(Request((5,), None, long))
        assert engine.stats().refused == 2
        assert engine.stats().waiting == {"a": 2, "b": 1}
    for stream in streams:
        assert stream.is_finished
    with pytest.raises(bd.EngineClosedError, match="closed"):
        engine.submit(Request((5,), None, long))


def test_adapters_come_and_go(engine: Engine, world: World) -> None:
    """Loaded while rows run; running rows finish on what they began with, waiting ones learn that it is gone."""
    engine.load_adapter("new", world.paths["c"])
    stream = engine.submit(Request((5, 9), "new", GREEDY))
    next(iter(stream))
    engine.unload_adapter("new")
    assert stream.result(30).ids == world.alone((5, 9), "c", COUNT)[1:], "the first token was read before"
    with pytest.raises(bd.UnknownAdapterError):
        engine.submit(Request((5, 9), "new", GREEDY))
    with pytest.raises(bd.AdapterError):
        engine.load_adapter("bad", world.paths["c"].parent / "nowhere")
    engine.load_adapter("new", world.paths["c"])
    blockers = [engine.submit(Request((5,), None, SamplingParams(max_tokens=46, ignore_eos=True))) for _ in range(3)]
    waiting = engine.submit(Request((5,), "new", GREEDY))
    engine.unload_adapter("new")
    finished = waiting.result(30).finished
    assert (finished.reason, type(finished.error)) == ("error", bd.UnknownAdapterError)
    for blocker in blockers:
        blocker.cancel()
        blocker.result(30)


def test_check_runs_a_step(engine: Engine, world: World) -> None:
    """Between the steps of rows that run; their tokens stay right."""
    streams = [engine.submit(request) for request in mixed(world, 3)]
    assert all(0 < engine.check() < 30 for _ in range(4))
    for request, stream in zip(mixed(world, 3), streams, strict=True):
        assert stream.result(30).ids == world.alone(request.prompt, request.adapter, COUNT)


def test_drain(unstarted: Callable[..., Engine], world: World) -> None:
    """What was accepted ends; what does not end in time is cancelled; new requests are refused."""
    with unstarted() as engine:
        stream = engine.submit(Request((5, 9), "a", GREEDY))
        assert engine.drain(30)
        assert stream.result(1).ids == world.alone((5, 9), "a", COUNT)
        with pytest.raises(bd.EngineClosedError, match="draining"):
            engine.submit(Request((5,), None, GREEDY))
    with unstarted() as engine:
        streams = [engine.submit(Request((5,), None, SamplingParams(max_tokens=46, ignore_eos=True))) for _ in range(9)]
        assert not engine.drain(0.001)
        assert {stream.result(5).finished.reason for stream in streams} >= {"cancelled"}


def test_a_request_on_its_way_to_a_row_is_not_over(
    unstarted: Callable[..., Engine], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the queue nor in a row while its adapter is brought in: a drain waits for it."""
    hold, is_held, may_go = bd.AdapterSet.hold, threading.Event(), threading.Event()

    def slow(self: bd.AdapterSet, name: str) -> Any:
        is_held.set()
        assert may_go.wait(10)
        return hold(self, name)

    with unstarted() as engine:
        monkeypatch.setattr(bd.AdapterSet, "hold", slow)
        stream = engine.submit(Request((5, 9), "a", GREEDY))
        assert is_held.wait(10)
        assert not engine._running_scheduler().is_idle
        may_go.set()
        assert engine.drain(30)
        assert stream.result(1).ids == world.alone((5, 9), "a", COUNT)


@pytest.fixture
def broken(unstarted: Callable[..., Engine]) -> Iterator[Engine]:
    with unstarted(step_timeout=0.3) as engine:
        yield engine


def test_an_error_in_a_step_ends_all(broken: Engine, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running and waiting requests end with it, later ones are refused with it, no reference is asked of anyone."""

    def fail(*args: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Batch, "decode", fail)
    streams = [broken.submit(request) for request in mixed(world, 2)]
    for stream in streams:
        assert "the device is gone" in str(stream.result(10).finished.error)
    with pytest.raises(bd.EngineClosedError, match="the device is gone"):
        broken.submit(mixed(world)[0])
    with pytest.raises(bd.EngineClosedError, match="the device is gone"):
        broken.check()
    release_all(world)


def test_a_step_that_hangs_ends_all(broken: Engine, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `step_timeout`, from another thread."""
    over = threading.Event()
    monkeypatch.setattr(Batch, "decode", lambda *args: over.wait(10))
    stream = broken.submit(mixed(world)[0])
    assert isinstance(stream.result(10).finished.error, bd.LostRankError)
    assert isinstance(broken.failed, bd.LostRankError)
    over.set()
    broken.close()
    release_all(world)


def release_all(world: World) -> None:
    """An engine that failed lets nothing go, since ranks may be lost; here they are not."""
    for number in list(world.adapters._opened):
        world.adapters._close(number)
