"""Compile the kernels that can fetch a weight for an H100, without one, and print what they do to memory, as JSON."""

import json

from bdlora_compile.runtime.kernels.cache import write_tokens
from bdlora_compile.runtime.kernels.norm import all_reduce_add_norm_rows
from tests.kernels.compile_norm import CONSTANTS, memory_of

FETCH = {"PIECES": 3072 * 10, "PIECES_A_ROW": 10, "ROW_BYTES": 8192, "THREADS": 128}
NO_FETCH = {"PIECES": 0, "PIECES_A_ROW": 1, "ROW_BYTES": 0, "THREADS": 128}
CACHE = {"HEADS": 4, "DIM": 128, "BLOCK_H": 4, "BLOCK_D": 128}
NORM = {name: value for name, value in CONSTANTS.items() if name not in FETCH}


def main() -> None:
    """One line: for each kernel the kinds with a weight to fetch, and without one."""
    kernels = ((write_tokens, CACHE), (all_reduce_add_norm_rows, NORM))
    found = {
        kernel.__name__: [memory_of(kernel, {**constants, **fetch}) for fetch in (FETCH, NO_FETCH)]
        for kernel, constants in kernels
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
