"""Compile the kernel that exchanges for an H100, without one, and print what it does to memory in order, as JSON."""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bdlora_compile.runtime.kernels.norm import all_reduce_add_norm_rows

VALUES = ("x", "residual", "weight", "total", "normed")
CONSTANTS = {"RANK": 1, "RANKS": 4, "COLUMNS": 4096, "BLOCK": 4096, "OVERLAP": True}
KINDS = {
    "wide load": r"ld\.global\.v4",
    "narrow load": r"ld\.global\.b16",
    "wide store": r"st\.global\.v4",
    "narrow store": r"st\.global\.b16",
    "release": r"atom\.global\.sys\.release\.exch\.b64",
    "acquire": r"atom\.global\.sys\.acquire\.add\.u64",
    "barrier": r"bar\.sync",
    "wait": r"griddepcontrol\.wait",
    "let start": r"griddepcontrol\.launch_dependents",
}


def main() -> None:
    """One line: a list of kinds, in the order of the code."""
    names = all_reduce_add_norm_rows.arg_names
    types = {**dict.fromkeys(VALUES, "*bf16"), "mailbox": "*i64", "epsilon": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*VALUES, "mailbox")}
    source = ASTSource(all_reduce_add_norm_rows, signature=signature, constexprs=CONSTANTS, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    lines = compiled.asm["ptx"].splitlines()
    print(json.dumps([kind for line in lines for kind, form in KINDS.items() if re.search(form, line)]))


if __name__ == "__main__":
    main()
