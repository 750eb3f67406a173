"""CUDA graphs for benchmarks: what launches a captured function again, and how long that takes."""

import statistics
from collections.abc import Callable

import torch


def captured(run: Callable[[], object], warm_up: int = 3) -> Callable[[], None]:
    """What replays ``run``, which has been called ``warm_up`` times before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    torch.cuda.synchronize()
    return graph.replay


def replay_us(run: Callable[[], object], groups: int = 7, milliseconds: float = 10) -> float:
    """Median time of a replay in microseconds, over groups of replays that take so long together."""
    replay = captured(run, warm_up=1)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(replays: int) -> float:
        begin.record()
        for _ in range(replays):
            replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1000 / replays

    timed(3)
    replays = max(2, int(milliseconds * 1000 / groups / timed(2)))
    return statistics.median(timed(replays) for _ in range(groups))
