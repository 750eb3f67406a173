"""Compile the kernel that exchanges for an H100, without one, and print what it does to memory in order, as JSON."""

import json
import re
from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bdlora_compile.runtime.kernels.norm import all_reduce_add_norm_rows

VALUES = ("x", "residual", "weight", "total", "normed", "matrix", "keys", "values", "k", "v")
NUMBERS = ("mailbox", "lengths")
CONSTANTS = {
    "RANK": 1, "RANKS": 4, "COLUMNS": 4096, "BLOCK": 4096, "OVERLAP": True,
    "PIECES": 0, "PIECES_A_ROW": 1, "ROW_BYTES": 0, "THREADS": 512,
}  # fmt: skip
KINDS = {
    "wide load": r"ld\.global\.v4",
    "narrow load": r"ld\.global\.b16",
    "wide store": r"st\.global\.v4",
    "narrow store": r"st\.global\.b16",
    "release": r"atom\.global\.sys\.release\.exch\.b64",
    "acquire": r"atom\.global\.sys\.acquire\.add\.u64",
    "barrier": r"bar\.sync",
    "wait": r"griddepcontrol\.wait",
    "fetch": r"cp\.async\.bulk\.prefetch\.L2\.global",
    "let start": r"griddepcontrol\.launch_dependents",
}


def memory_of(kernel: Any, constants: Mapping[str, Any]) -> list[str]:
    """What a kernel does to memory, in the order of its code."""
    names = kernel.arg_names
    types = {**dict.fromkeys(VALUES, "*bf16"), **dict.fromkeys(NUMBERS, "*i64"), "epsilon": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    pointers = [name for name in names if name in (*VALUES, *NUMBERS)]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    lines = compiled.asm["ptx"].splitlines()
    return [kind for line in lines for kind, form in KINDS.items() if re.search(form, line)]


def main() -> None:
    """One line: a list of kinds, in the order of the code."""
    print(json.dumps(memory_of(all_reduce_add_norm_rows, CONSTANTS)))


if __name__ == "__main__":
    main()
