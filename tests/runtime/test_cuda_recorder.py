"""How CUDA graphs are recorded: on which stream, into which pool, and what is left where it fails."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from bdlora_compile.runtime.step_graphs import CudaRecorder


class FakeCuda:
    """What torch keeps while it records, and what it was told in order. A recording that fails leaves it as torch does.

    Attributes:
        current: the current stream.
        open_pools: pools that are being recorded into.
        streams: of the recordings so far.
    """

    def __init__(self) -> None:
        self.caller = MagicMock()
        self.current: object = self.caller
        self.open_pools: list[object] = []
        self.streams: list[object] = []
        self.told: list[str] = []

    @contextmanager
    def graph(self, graph: object, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert pool not in self.open_pools, "already recording to it"
        self.told.append("recording begins")
        self.streams.append(stream)
        self.current = stream
        self.open_pools.append(pool)
        yield
        self.open_pools.remove(pool)
        self.current = self.caller

    def set_stream(self, stream: object) -> None:
        self.current = stream

    def end(self, _: int, pool: object) -> None:
        self.open_pools.remove(pool)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    parts: dict[str, Any] = {
        "CUDAGraph": MagicMock,
        "Stream": object,
        "graph": fake.graph,
        "graph_pool_handle": object,
        "current_stream": lambda: fake.current,
        "set_stream": fake.set_stream,
        "current_blas_handle": lambda: fake.told.append("handle"),
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end, raising=False)
    return fake


def test_a_thread_has_its_handle_of_cublas_before_it_records(cuda: FakeCuda) -> None:
    """Another thread may have warmed the forward up, and inside a recording the handle cannot be made."""
    CudaRecorder()(lambda: cuda.told.append("forward"))
    assert cuda.told == ["handle", "recording begins", "forward"]


def test_each_recorder_has_a_stream_of_its_own(cuda: FakeCuda) -> None:
    """Nothing else uses it, and all of a recorder's graphs do: the workspace that cuBLAS has there is their pool's."""
    for recorder in (CudaRecorder(), CudaRecorder()):
        for _ in range(2):
            recorder(lambda: None)
    streams = cuda.streams
    assert streams[0] is streams[1] is not streams[2] is streams[3]


def test_a_recording_that_breaks_off_leaves_nothing_behind(cuda: FakeCuda) -> None:
    """torch leaves its stream current and its pool open: later work would run there, later recordings be refused."""
    recorder = CudaRecorder()
    with pytest.raises(ZeroDivisionError):
        recorder(lambda: 1 // 0)
    assert cuda.current is cuda.caller
    assert not cuda.open_pools
    assert recorder(lambda: "results")[1] == "results"
    assert cuda.streams[0] is not cuda.streams[1], "on another stream than the one that broke"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuBLAS is on GPUs")
@pytest.mark.parametrize("arguments", [(), ("--shared",)])
def test_recorded_products_outlive_what_torch_keeps_for_cublas(arguments: Sequence[str]) -> None:
    """Another model's graphs make torch give its workspaces back; the twin shares its stream with plain forwards."""
    command = [sys.executable, "-m", "tests.runtime.cleared_workspaces", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (found.stdout.strip() == "equal") is not bool(arguments), found.stderr
