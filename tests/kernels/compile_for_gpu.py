"""Compile kernels for an H100, without one, and print as JSON what each does to memory, in the order of its code, and
how many registers a thread has.

A process of its own: elsewhere in the tests Triton is an interpreter.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bdlora_compile.runtime.kernels.apply import apply_tokens
from bdlora_compile.runtime.kernels.cache import write_tokens
from bdlora_compile.runtime.kernels.delta import delta_tokens
from bdlora_compile.runtime.kernels.delta_mixed import delta_mixed
from bdlora_compile.runtime.kernels.early import count_launch
from bdlora_compile.runtime.kernels.expand import expand_segments, expand_tokens
from bdlora_compile.runtime.kernels.group import group_tokens
from bdlora_compile.runtime.kernels.norm import all_reduce_add_norm_rows
from bdlora_compile.runtime.kernels.rotary import rotate_tokens
from bdlora_compile.runtime.kernels.shrink import shrink_segments, shrink_tokens
from bdlora_compile.runtime.kernels.shrink_mixed import shrink_mixed
from bdlora_compile.runtime.kernels.swiglu import swiglu_tokens

TYPES = {
    **dict.fromkeys(("x", "y", "pool", "weight", "residual", "total", "normed"), "*bf16"),
    **dict.fromkeys(("keys", "values", "k", "v", "gate_up", "m", "q", "cos", "sin", "delta"), "*bf16"),
    **dict.fromkeys(("scales", "h", "counter"), "*fp32"),
    **dict.fromkeys(("token_slot", "order", "segments"), "*i32"),
    **dict.fromkeys(("slots", "mailbox", "lengths"), "*i64"),
    "epsilon": "fp32",
}
"""Of arguments; the others are numbers, int32."""

KINDS = {
    "wide load": r"ld\.global\.v4",
    "load of 8 bytes": r"ld\.global\.v2",
    "narrow load": r"ld\.global\.b16",
    "load to shared memory": r"cp\.async\.c",
    "wide store": r"st\.global\.v4",
    "store of 8 bytes": r"st\.global\.v2",
    "narrow store": r"st\.global\.b16",
    "release": r"atom\.global\.sys\.release\.exch\.b64",
    "acquire": r"atom\.global\.sys\.acquire\.add\.u64",
    "barrier": r"bar\.sync",
    "wait": r"griddepcontrol\.wait",
    "let start": r"griddepcontrol\.launch_dependents",
}

WORDS = {
    "load": r"ld\.global\.b32",
    "store": r"st\.global\.b32",
    "barrier": r"bar\.sync",
}
"""The same of kernels that know whole numbers only."""

SHRINK = {"SPLITS": 4, "PARTS": 1, "PART": 0, "ROWS": 8, "BLOCK_K": 1024}
MIXED = {"SPLITS": 4, "ROWS": 16, "BLOCK_K": 1024, "PART_K": 256, "BLOCK_T": 16}
EXPAND = {"PLANES": 2, "PARTS": 1}
APPLY = {"IN": 1024, "OUT0": 512, "OUT1": 128, "OUT2": 128, "ROWS": 8, "BLOCK_K": 1024, "BLOCK_O": 1024}
GATE_UP = {"IN": 4096, "OUT0": 1792, "OUT1": 1792, "OUT2": 0, "BLOCK_K": 4096, "BLOCK_O": 2048}
DELTA = {
    **{"OUT0": 2048, "OUT1": 512, "OUT2": 512, "ROOM0": 2048, "ROOM1": 512, "ROOM2": 512},
    **{"PLANES": 2, "PARTS": 1, "BLOCK_R": 16, "BLOCK_O": 1024},
}
NORM = {"RANK": 1, "RANKS": 4, "COLUMNS": 4096, "BLOCK": 4096, "HAS_DELTA": False}
SWIGLU = {"FEATURES": 7168, "BLOCK": 1024, "HAS_DELTA": True}
ROTARY = {"HEADS": 16, "KV_HEADS": 4, "DIM": 128, "BLOCK_H": 2, "HALF": 64, "HAS_DELTA": True}
CACHE = {"HEADS": 4, "DIM": 128, "BLOCK_H": 4, "BLOCK_D": 128}
KERNELS: dict[str, tuple[Any, Mapping[str, Any], int]] = {
    "shrink": (shrink_tokens, SHRINK, 4),
    "expand": (expand_tokens, {**EXPAND, "BLOCK_R": 8, "BLOCK_O": 1024}, 4),
    "shrink by segment": (shrink_segments, {"SPLITS": 4, "BLOCK_T": 64, "BLOCK_R": 32, "BLOCK_K": 128}, 4),
    "shrink, mixed": (shrink_mixed, MIXED, 4),
    "expand by segment": (expand_segments, {**EXPAND, "BLOCK_T": 64, "BLOCK_R": 16, "BLOCK_O": 64, "REPEAT": 8}, 4),
    "expand in wide rows": (expand_tokens, {**EXPAND, "BLOCK_R": 16, "BLOCK_O": 512}, 4),
    "apply, rank 2, gate/up of 8B": (apply_tokens, {**GATE_UP, "ROWS": 2}, 8),
    "apply, rank 8, gate/up of 8B": (apply_tokens, {**GATE_UP, "ROWS": 8}, 8),
    "apply": (apply_tokens, {**APPLY}, 4),
    "delta": (delta_tokens, DELTA, 4),
    "delta, mixed": (delta_mixed, {**DELTA, "BLOCK_T": 16, "SHARES": 4, "TOGETHER": 8}, 4),
    "norm": (all_reduce_add_norm_rows, NORM, 16),
    "norm and delta": (all_reduce_add_norm_rows, {**NORM, "HAS_DELTA": True}, 16),
    "swiglu": (swiglu_tokens, SWIGLU, 4),
    "rotary": (rotate_tokens, ROTARY, 1),
    "rotary without delta": (rotate_tokens, {**ROTARY, "HAS_DELTA": False}, 1),
    "cache": (write_tokens, CACHE, 4),
    "early": (count_launch, {}, 1),
    "group": (group_tokens, {"SIZE": 16, "BLOCK": 64}, 8),
}
"""Kernel, constants and warps."""


def code_of(kernel: Any, constants: Mapping[str, Any], warps: int) -> str:
    """A kernel in PTX, with early starts where it has them."""
    names = kernel.arg_names
    constants = {name: value for name, value in {**constants, "OVERLAP": True}.items() if name in names}
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    unknown = {*constants, *kernel.do_not_specialize, "epsilon"}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in unknown}
    source = ASTSource(kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"])


def memory_of(code: str, kinds: Mapping[str, str]) -> list[str]:
    """Kinds of accesses and of waiting, in the order of the code."""
    return [kind for line in code.splitlines() for kind, form in kinds.items() if re.search(form, line)]


def registers_of(code: str) -> int:
    """Of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(code)
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file, "-o", file.with_suffix(".cubin")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"Used (\d+) registers", told)
    assert found is not None, told
    return int(found[1])


def main() -> None:
    """One line."""
    code = {name: code_of(*kernel) for name, kernel in KERNELS.items()}
    kinds = {name: WORDS if name == "group" else KINDS for name in code}
    print(json.dumps({name: [memory_of(text, kinds[name]), registers_of(text)] for name, text in code.items()}))


if __name__ == "__main__":
    main()
