"""Forwards on several streams of a GPU run one after the other; stand-ins for streams say who waits for whom."""

from typing import Any

import pytest
import torch

import bdlora_compile as bd
from bdlora_compile.runtime.copier import StreamCopier
from tests.api.conftest import Files, files  # noqa: F401  # a fixture


class FakeStream:
    """Remembers what it waited for."""

    def __init__(self, *_: object) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: "FakeStream") -> None:
        self.waited.append(other)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What torch says of a GPU; a test changes it."""
    state: dict[str, Any] = {"stream": FakeStream(), "is_capturing": False}
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: state["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["is_capturing"])
    return state


def test_a_forward_on_another_stream_waits_for_the_one_before(gpu: dict[str, Any]) -> None:
    first, second = gpu["stream"], FakeStream()
    copier = StreamCopier(torch.device("cuda"))
    copier.step([])
    assert first.waited == [], "nothing is before it"
    gpu["stream"] = second
    copier.step([])
    copier.step([])
    assert second.waited == [first], "once"
    gpu["stream"] = first
    copier.step([])
    assert first.waited == [second]


def test_a_caller_who_records_waits_for_no_other_stream(gpu: dict[str, Any]) -> None:
    """CUDA forbids it inside; and forwards to come do not wait for a stream that was being recorded."""
    first, recorded = gpu["stream"], FakeStream()
    copier = StreamCopier(torch.device("cuda"))
    copier.step([])
    gpu |= {"stream": recorded, "is_capturing": True}
    copier.step([])
    gpu |= {"stream": first, "is_capturing": False}
    copier.step([])
    assert recorded.waited == first.waited == []


def test_slots_of_tokens_are_written_behind_the_forward_before(
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which may still read them on another stream."""
    model, adapters = bd.load(files.model, files.adapters, device="cpu")
    (rank,) = model.bdlora.ranks
    seen: list[list[int]] = []
    monkeypatch.setattr(rank.bank, "before_step", lambda _: seen.append(rank.bank.token_slot[:2].tolist()))
    with adapters.use(["blocks", "plain"]):
        assert model.bdlora.select(2, 1)
    first = rank.bank.token_slot[:2].tolist()
    with adapters.use(["plain", None]):
        assert model.bdlora.select(2, 1)
    assert seen[1] == first != rank.bank.token_slot[:2].tolist()
