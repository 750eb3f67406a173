"""The engine's parts by themselves: queues, texts, sampling, messages."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import bdlora_compile as bd
from bdlora_compile.runtime.cache import CacheShape, LocalCache
from bdlora_compile.serving import text
from bdlora_compile.serving.messages import Call, Reader, Signal, Writer
from bdlora_compile.serving.queues import FairQueues, Key, Readiness
from bdlora_compile.serving.requests import SamplingParams
from bdlora_compile.serving.sampling import RowSampling, choose_tokens
from bdlora_compile.serving.text import TextStream, fast_tokenizer_of

# --- queues -----------------------------------------------------------------------------------------------------------


def always(key: Key) -> Readiness:
    return Readiness.READY


def all_but_stuck(key: Key) -> Readiness:
    return Readiness.NO_ROOM if key == "stuck" else Readiness.READY


def test_a_flood_starves_nobody() -> None:
    """One adapter sends ten times what the others send, with answers twice as long: all are served alike."""
    queues: FairQueues[str] = FairQueues(10_000, 10_000)
    served: Counter[Key] = Counter()
    for _ in range(1000):
        queues.put("flood", "x")
    for _ in range(100):
        queues.put("quiet", "x")
        queues.put(None, "x")
    for _ in range(150):
        turn = queues.next(always, 1)
        assert turn is not None
        queues.pop(turn[0])
        tokens = 20 if turn[0] == "flood" else 10
        queues.charge(turn[0], tokens)
        served[turn[0]] += tokens
    assert max(served.values()) - min(served.values()) <= 20, "one request's tokens"


def test_what_was_not_asked_for_cannot_be_claimed_later() -> None:
    """An adapter that comes late begins where the others are."""
    queues: FairQueues[int] = FairQueues(1000, 1000)
    for number in range(100):
        queues.put("early", number)
    for _ in range(50):
        queues.pop("early")
        queues.charge("early", 10)
    for number in range(50):
        queues.put("late", number)
    order = []
    for _ in range(20):
        (key,) = queues.next(always, 1) or (None,)
        order.append(key)
        queues.pop(key)
        queues.charge(key, 10)
    assert 9 <= order.count("early") <= 11


def test_an_adapter_without_room_is_overtaken_a_few_times_only() -> None:
    """Then nobody is served before it."""
    queues: FairQueues[int] = FairQueues(1000, 1000)
    queues.put("stuck", 0)
    for number in range(10):
        queues.put("other", number)
    assert [queues.next(all_but_stuck, 3) for _ in range(5)] == [("other",)] * 3 + [None] * 2
    assert queues.next(always, 3) == ("stuck",)
    queues.pop("stuck")
    assert queues.next(always, 3) == ("other",)


def test_an_adapter_that_is_still_read_stops_nobody() -> None:
    """Its requests lose nothing by others that go first."""
    queues: FairQueues[int] = FairQueues(1000, 1000)
    queues.put("slow", 0)
    for number in range(10):
        queues.put("other", number)
    for _ in range(10):
        assert queues.next(lambda key: Readiness.COMING if key == "slow" else Readiness.READY, 3) == ("other",)
        queues.pop("other")
    assert queues.next(always, 3) == ("slow",)


def test_in_order_within_an_adapter_and_nothing_kept() -> None:
    """First come, first served; adapters that left leave no counter."""
    queues: FairQueues[int] = FairQueues(1000, 1000)
    for number in range(5):
        queues.put("a", number)
    assert queues.remove(lambda item: item in (1, 3)) == [1, 3]
    assert [queues.pop("a") for _ in range(3)] == [0, 2, 4]
    for name in map(str, range(1000)):
        queues.put(name, 0)
        queues.pop(name)
    assert len(queues._served) < 5
    assert not queues._passed


# --- texts ------------------------------------------------------------------------------------------------------------


def bytes_tokenizer() -> Tokenizer:
    """Each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def stream(text: str, stops: tuple[str, ...] = (), cut: int | None = None) -> tuple[list[str], str | None]:
    """What is shown after each token, and the stop text."""
    tokenizer = bytes_tokenizer()
    texts = TextStream(tokenizer, stops)
    shown = []
    for token in tokenizer.encode(text).ids[:cut]:
        new, stop = texts.push(token)
        shown.append(new)
        if stop is not None:
            return shown, stop
    new, stop = texts.finish()
    return [*shown, new], stop


def test_characters_of_several_tokens_come_whole() -> None:
    """And one that was cut off is shown as the tokenizer shows it."""
    shown, _ = stream("naïve 🙂!")
    assert "".join(shown) == "naïve 🙂!"
    assert "🙂" in shown
    cut, _ = stream("a🙂", cut=3)
    assert "".join(cut) == bytes_tokenizer().decode(bytes_tokenizer().encode("a🙂").ids[:3])


def test_a_decoder_that_gives_up_costs_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers' stream raises where a token changes the text of those before it; other requests must not notice."""

    class GivesUp:
        def __init__(self, skip_special_tokens: bool) -> None:
            self._left = 3
            self._stream = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)

        def step(self, tokenizer: Tokenizer, token: int) -> str | None:
            self._left -= 1
            if self._left < 0:
                raise Exception("Invalid prefix encountered while decoding stream")
            return self._stream.step(tokenizer, token)

    monkeypatch.setattr(text, "DecodeStream", GivesUp)
    shown, _ = stream("naïve 🙂!")
    assert "".join(shown) == "naïve 🙂!"
    assert "🙂" in shown


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stop"),
    [
        ("hello world", ("lo w",), "hel", "lo w"),
        ("aaab", ("aab",), "a", "aab"),
        ("abcabd", ("abd",), "abc", "abd"),
        ("one two", ("x", "wo", " t"), "one", " t"),
        ("ends with EN", ("END",), "ends with EN", None),
        ("stop🙂here", ("🙂",), "stop", "🙂"),
    ],
)
def test_stop_texts(text: str, stops: tuple[str, ...], expected: str, stop: str | None) -> None:
    """Across tokens; the earliest one; nothing of it is ever shown, and nothing else is lost."""
    shown, found = stream(text, stops)
    assert ("".join(shown), found) == (expected, stop)


def test_slow_tokenizers_are_refused() -> None:
    """By name of the class."""
    with pytest.raises(bd.ConfigError, match=r"a object.*fast tokenizer"):
        fast_tokenizer_of(object())


# --- sampling ---------------------------------------------------------------------------------------------------------


def draws(settings: Mapping[str, float], logits: torch.Tensor, count: int) -> torch.Tensor:
    """Shares of each token in ``count`` draws, each of a row with a seed of its own."""
    rows = {row: RowSampling(SamplingParams(seed=row, **settings)) for row in range(count)}  # type: ignore[arg-type]
    chosen = [choice.id for choice in choose_tokens(logits.expand(count, -1), rows).read().values()]
    return torch.bincount(torch.tensor(chosen), minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("settings", "keep"),
    [({}, 6), ({"temperature": 0.5}, 6), ({"top_k": 3}, 3), ({"top_p": 0.6}, 2), ({"top_k": 4, "top_p": 0.85}, 3)],
)
def test_draws_follow_the_distribution(settings: dict[str, float], keep: int) -> None:
    """Of temperature, then top_k, then top_p: against probabilities computed by hand."""
    probabilities = torch.tensor([0.05, 0.35, 0.1, 0.3, 0.15, 0.05], dtype=torch.float64)
    warm = probabilities ** (1 / settings.get("temperature", 1.0))
    best = warm.argsort(descending=True, stable=True)[:keep]
    expected = torch.zeros_like(warm)
    expected[best] = warm[best] / warm[best].sum()
    found = draws(settings, probabilities.log(), 4000)
    # Four standard deviations of a share of 4,000 draws.
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)
    assert not found[expected == 0].any()


def test_rows_do_not_depend_on_one_another() -> None:
    """A row gets the same tokens whatever other rows ask for."""
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    own = SamplingParams(seed=3, logprobs=2)
    alone = choose_tokens(logits[1:2], {0: RowSampling(own)}).read()[0]
    others = [SamplingParams(temperature=0), SamplingParams(seed=1, top_p=0.5, top_k=7, logprobs=5)]
    mixed = choose_tokens(logits, {0: RowSampling(others[0]), 1: RowSampling(own), 2: RowSampling(others[1])}).read()
    assert (mixed[1].id, len(mixed[1].top)) == (alone.id, 2)
    assert mixed[0].id == logits[0].argmax()


def test_temperatures_near_zero_are_greedy() -> None:
    """And no number overflows."""
    logits = torch.tensor([[1000.0, 999.0, -1000.0]])
    assert choose_tokens(logits, {0: RowSampling(SamplingParams(temperature=1e-300, seed=1))}).read()[0].id == 0


def test_logits_that_are_no_numbers_are_seen() -> None:
    """In their row alone."""
    logits = torch.tensor([[0.0, math.nan], [0.0, 1.0]])
    rows = {row: RowSampling(SamplingParams(temperature=0, logprobs=1)) for row in range(2)}
    assert [choice.id for choice in choose_tokens(logits, rows).read().values()] == [-1, 1]


# --- messages ---------------------------------------------------------------------------------------------------------


class Nobody:
    """A leader that sends nothing."""

    lost: bd.LostRankError | None = None

    def run(self, *args: Any) -> Any:
        raise AssertionError


def test_tensors_arrive_with_their_strides() -> None:
    """Views, expanded ones, scalars, empty ones and bfloat16: graphs are guarded by strides."""
    tensors = [
        torch.arange(24).reshape(4, 6)[:, 2:4],
        torch.arange(6).reshape(2, 3).T,
        torch.arange(3)[:, None].expand(3, 4),
        torch.tensor(7, dtype=torch.int32),
        torch.empty(0, 3),
        torch.randn(2, 2, dtype=torch.bfloat16),
        torch.tensor([True, False]),
    ]
    target = object()
    writer, reader = Writer(Nobody(), {"it": target}), Reader({}, {"it": target}, torch.device("cpu"))
    message = reader.read(writer.write(Call(target, "run", tensors, {}, False, False)))
    assert isinstance(message, Call)
    assert message.target is target
    for sent, got in zip(tensors, message.args, strict=True):
        assert torch.equal(sent, got)
        assert (sent.dtype, sent.stride()) == (got.dtype, got.stride())


def test_what_cannot_be_sent_is_refused() -> None:
    """Before anything is sent."""
    with pytest.raises(bd.ConfigError, match="cannot be sent"):
        Writer(Nobody(), {}).write(Call(None, "run", [lambda: None], {}, False, False))


CACHE = CacheShape(1, 1, 4, torch.float32, torch.device("cpu"))


def cache_messages() -> tuple[Callable[[LocalCache], Call], Writer, Reader, "weakref.WeakSet[LocalCache]"]:
    """Calls with a cache, what writes and reads them, and the caches that the reader has made and that are there."""
    target, made = object(), weakref.WeakSet[LocalCache]()

    def make(batch: int, length: int, number: Hashable) -> LocalCache:
        assert not made, "the one before is gone before another is made"
        made.add(cache := LocalCache(CACHE, batch, length))
        return cache

    def call(cache: LocalCache) -> Call:
        return Call(target, "run", (), {"past_key_values": cache}, False, False)

    fixed = {"it": target}
    return call, Writer(Nobody(), fixed), Reader({"LocalCache": make}, fixed, torch.device("cpu")), made


def test_caches_end_on_other_ranks_when_they_do_on_rank_0() -> None:
    """Each is in several calls, as in a loop of tokens; one that cannot be sent with its call is no exception."""
    call, writer, reader, made = cache_messages()
    for _ in range(3):
        cache = LocalCache(CACHE, 1, 8)
        for _ in range(3):
            reader.read(writer.write(call(cache)))
            assert len(made) == 1
        del cache
        with pytest.raises(bd.ConfigError, match="cannot be sent"):
            writer.write(Call(None, "run", [lambda: None], {}, False, False))
    reader.read(writer.write(Signal.BEAT))
    assert not made


def test_a_cache_that_was_filled_before_is_refused_each_time() -> None:
    """Other ranks would make an empty one."""
    call, writer, _, _ = cache_messages()
    cache = LocalCache(CACHE, 1, 8)
    cache.set_lengths([3])
    for _ in range(2):
        with pytest.raises(bd.ConfigError, match="filled before the other ranks followed"):
            writer.write(call(cache))
    assert cache.leader is None
