"""Two hand-written S-LoRA blocks, compiled: their LoRA collectives go, their results stay.

torchrun --standalone --nproc-per-node 2 examples/handwritten_slora.py
"""

import torch
import torch.distributed as dist
from slora_blocks import ModuleBlock, Whole, functional_block

from bdlora_compile.report import Report


def main() -> None:
    """Compile both blocks and compare them with the dense computation."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole = Whole.random(width=64, inner=256, rank=16, nblocks=2 * dist.get_world_size())
    x = torch.randn(2, 7, 64, dtype=torch.float64)
    for build in (ModuleBlock, functional_block):
        reports: list[Report] = []
        block = torch.compile(build(whole), backend="bdlora", options={"on_report": reports.append})
        with torch.no_grad():
            error = (block(x) - whole.reference(x)).abs().max()
        if dist.get_rank() == 0:
            print(f"{build.__name__}: largest difference from the dense block {error:.1e}")
            print(reports[0].summary(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
