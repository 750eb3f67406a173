"""A base product on a stream beside the current one, while what needs its operand alone is launched on that one.

And launches that must have ended before any kernel starts that is launched behind them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def product_beside(x: Tensor, weight: Tensor, bias: Tensor | None, others: Callable[[], T]) -> tuple[Tensor, T]:
    """(x W^T + bias, what ``others`` returns): on a GPU at the same time, elsewhere one after the other.

    A product of few rows waits for memory, what is beside it for latencies, of launches or of other ranks. Both may be
    recorded in a CUDA graph.

    Args:
        x: [..., D]. weight: W [O, D]. bias: [O].
        others: launches on the current stream what reads neither the product nor what it writes.

    Returns:
        [..., O] like x, and the other result; what the current stream runs next finds both there.
    """
    if not x.is_cuda:
        return torch.nn.functional.linear(x, weight, bias), others()
    rows = x.reshape(-1, x.shape[-1])
    # Of the current stream's memory, since that stream is where it is read and given back.
    y = x.new_empty(rows.shape[0], weight.shape[0])
    with _second_stream(x.device) as beside:
        with torch.cuda.stream(beside):
            if bias is None:
                torch.mm(rows, weight.t(), out=y)
            else:
                torch.addmm(bias, rows, weight.t(), out=y)
        result = others()
    return y.view(*x.shape[:-1], weight.shape[0]), result


def ended_before_others(device: torch.device, launch: Callable[[], None]) -> None:
    """Launch what the current stream's next kernels read at once, also those that start early, on the other stream.

    A kernel that may start before the one ahead in its stream has ended (programmatic dependent launch) waits for other
    streams' kernels in any case.
    """
    if device.type != "cuda":
        launch()
        return
    with _second_stream(device) as beside, torch.cuda.stream(beside):
        launch()


@contextmanager
def _second_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream that starts behind what the current one has, and that the current one waits for at the end.

    Also where something fails between: memory that the second one uses is given back to the current one.
    """
    current = torch.cuda.current_stream(device)
    beside = _stream_beside(current)
    beside.wait_stream(current)
    try:
        yield beside
    finally:
        current.wait_stream(beside)


@cache
def _stream_beside(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """Always the same one, since torch keeps a workspace for cuBLAS on each.

    A recording, which has a stream of its own (`step_graphs.CudaRecorder`), has one of its own here, too: what plain
    forwards and other threads launch meanwhile is not recorded, and their workspace is not the graph's.
    """
    return torch.cuda.Stream(current.device)
