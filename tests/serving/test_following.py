"""A rank that fails alone: it ends, and rank 0 says why it did. The channel is a script; no process is started."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

import bdlora_compile as bd
from bdlora_compile.runtime.leading import led
from bdlora_compile.serving import following
from bdlora_compile.serving.following import _Channel, _follow, _Leading
from bdlora_compile.serving.messages import Call, Signal, Writer
from tests.serving.conftest import World


class Script(_Channel):
    """Says what it is told to say, then breaks; sending breaks it at once."""

    def __init__(self, *messages: bytes, ranks: int = 3) -> None:
        self._messages = list(messages)
        self._group: Any = SimpleNamespace(size=lambda: ranks)
        self._store = HashStore()

    def send(self, data: bytes) -> None:
        raise RuntimeError("connection closed by peer")

    def receive(self, limit: timedelta | None = None) -> bytes:
        if not self._messages:
            raise RuntimeError("connection closed by peer")
        return self._messages.pop(0)


class Target:
    """Something that every rank has; here it fails."""

    leader: Any = None

    @led
    def work(self) -> None:
        raise MemoryError("the device is full")


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(following, "_BEAT_SECONDS", 100.0)


def messages(target: Target, *kinds: str) -> list[bytes]:
    """A call that fails, and signals by name."""
    writer = Writer(None, {"target": target})  # type: ignore[arg-type]  # nothing is named that has a leader
    call = Call(target, "work", (), {}, grad=False, inference=False)
    return [writer.write(call if kind == "call" else Signal[kind]) for kind in kinds]


@pytest.mark.parametrize("after", [[], ["BEAT"], ["call"]], ids=["silence", "a beat", "the next call"])
def test_rank_0_tells_what_another_rank_failed_of(world: World, after: list[str]) -> None:
    target = Target()
    channel = Script(*messages(target, "call", *after))
    with pytest.raises(bd.LostRankError, match=r"this rank.*MemoryError: the device is full"):
        _follow(channel, world.model, {"target": target})
    said = r"alone \(rank 2: MemoryError: the device is full\)"
    with pytest.raises(bd.LostRankError, match=said), _Leading(channel, {"target": target}) as leader:
        leader.run(Target.work, target, (), {})


def test_a_call_that_fails_everywhere_is_no_loss(world: World) -> None:
    """Rank 0 says that it failed too; nobody leaves a word."""
    target = Target()
    channel = Script(*messages(target, "call", "FAILED", "call", "FAILED", "END"))
    _follow(channel, world.model, {"target": target})
    assert channel.word() is None


def test_a_rank_that_is_gone_without_a_word(world: World) -> None:
    channel = Script(*messages(Target(), "FAILED"))
    with pytest.raises(bd.LostRankError, match="rank 0, in a call"):
        _follow(channel, world.model, {"target": Target()})
    with pytest.raises(bd.LostRankError, match="broken connection"), _Leading(channel, {}) as leader:
        leader.run(torch.zeros, 1, (), {})


@pytest.mark.parametrize(("ranks", "who"), [(2, "rank 0: found"), (3, "rank 0, or another rank that follows: found")])
def test_messages_that_end_are_another_ranks_loss(world: World, ranks: int, who: str) -> None:
    """Of more than two ranks rank 0 may be well."""
    with pytest.raises(bd.LostRankError, match=f"^{who} a broken connection"):
        _follow(Script(*messages(Target(), "BEAT"), ranks=ranks), world.model, {"target": Target()})
