"""Compile kernels for an H100, without one, and print how often each loads 16 bytes and 2 bytes at once, as JSON."""

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bdlora_compile.runtime.kernels.apply import apply_tokens
from bdlora_compile.runtime.kernels.expand import expand_segments, expand_tokens
from bdlora_compile.runtime.kernels.shrink import shrink_tokens

POINTERS = {"x": "*bf16", "y": "*bf16", "pool": "*bf16", "slots": "*i64", "scales": "*fp32", "h": "*fp32"}
POINTERS |= {"token_slot": "*i32", "order": "*i32", "segments": "*i32"}
EXPAND = {"PLANES": 2, "PARTS": 1, "OVERLAP": True}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (shrink_tokens, {"SPLITS": 2, "ROWS": 8, "BLOCK_K": 2048, "OVERLAP": True}),
    (expand_tokens, {**EXPAND, "BLOCK_R": 8, "BLOCK_O": 1024}),
    (expand_segments, {**EXPAND, "BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_O": 128, "REPEAT": 1}),
    (apply_tokens, {"IN": 1024, "OUT0": 512, "OUT1": 128, "OUT2": 128, "ROWS": 8, "BLOCK_K": 1024, "BLOCK_O": 1024}),
]


def main() -> None:
    """One line: loads of 16 and of 2 bytes by kernel."""
    found = {}
    for kernel, constants in KERNELS:
        names = kernel.arg_names
        known = {**constants, "OVERLAP": True}
        signature = {name: "constexpr" if name in known else POINTERS.get(name, "i32") for name in names}
        varying = {*known, *kernel.do_not_specialize}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in varying}
        source = ASTSource(kernel, signature=signature, constexprs=known, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        loads = re.findall(r"ld\.global[\w.]*", compiled.asm["ptx"])
        found[kernel.__name__] = [sum("v4.b32" in load for load in loads), sum(load.endswith("b16") for load in loads)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
