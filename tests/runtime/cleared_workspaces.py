"""A recorded forward is replayed after torch gave all of cuBLAS's workspaces back, as other graphs make it do.

    python -m tests.runtime.cleared_workspaces              prints "equal"
    python -m tests.runtime.cleared_workspaces --shared     recorded on a stream of plain forwards: fails

In a process of its own: what an illegal access leaves behind is of no use.
"""

import sys

import torch

from bdlora_compile.runtime.beside import product_beside
from bdlora_compile.runtime.step_graphs import CudaRecorder

ROWS, IN, OUT = 16, 7168, 4096
"""down_proj of Llama-3.1-8B on two ranks: cuBLAS sums parts of it in its workspace."""


def main() -> None:
    """Record, give back, replay."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, IN, generator=generator, device="cuda").bfloat16() for n in (ROWS, OUT))

    def forward() -> list[torch.Tensor]:
        return [product_beside(x, weight, None, lambda: None)[0], torch.mm(x, weight.t())]

    recorder = CudaRecorder()
    if "--shared" in sys.argv:
        recorder._pool, recorder._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        with torch.cuda.stream(recorder._stream):
            forward()
    forward()
    replay, results = recorder(forward)
    replay()
    expected = [result.clone() for result in results]
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    for result in results:
        result.zero_()
    replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    print("equal")


if __name__ == "__main__":
    main()
