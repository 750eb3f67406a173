"""Kernels compiled for a GPU: how wide they load, who waits where, how many registers they have."""

import json
import os
import subprocess
import sys
from itertools import groupby

import pytest

Code = dict[str, list[str]]
Compiled = dict[str, tuple[list[str], int]]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """By kernel what it does to memory, in the order of its code, and its registers (`compile_for_gpu.py`)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    return {name: (memory, registers) for name, (memory, registers) in json.loads(ran.stdout).items()}


@pytest.fixture
def code(compiled: Compiled) -> Code:
    """What each kernel does to memory."""
    return {name: memory for name, (memory, _) in compiled.items()}


@pytest.mark.parametrize(
    ("kernel", "most"),
    [("shrink", 96), ("expand", 96), ("apply", 120), ("shrink by segment", 80), ("expand by segment", 126)],
)
def test_seldom_branches_cost_no_registers(compiled: Compiled, kernel: str, most: int) -> None:
    """As many as the branches for multiples of 8 need by themselves: they decide how many programs a GPU holds.

    With branches for other sizes as wide as these it was 139, 179, 186, 122 and 255.
    """
    assert 0 < compiled[kernel][1] <= most + 8, "compilers differ by a few"


@pytest.mark.parametrize("kernel", ["shrink", "expand", "expand by segment", "apply"])
def test_odd_sizes_are_not_taken_for_multiples_of_eight(code: Code, kernel: str) -> None:
    """Both are there: wide loads for the one branch, narrow ones for the other, which would fault otherwise."""
    assert "wide load" in code[kernel]
    assert "narrow load" in code[kernel]


def test_an_exchange_releases_and_acquires_for_the_whole_system(code: Code) -> None:
    """All threads' values are written, then peers are told; all threads read the peers' after one of them was told.

    Between a thread's writes and another's release, and an acquire and other threads' reads, there is a barrier.
    """
    order = code["norm"]
    assert "narrow load" not in order
    assert "narrow store" not in order
    tell, wait = order.index("release"), order.index("acquire")
    last = len(order) - 1 - order[::-1].index("acquire")
    assert order[:tell] == ["wide load", "wait", "wide load", "wide load", "wide store", "barrier"]
    assert tell < wait <= last
    assert "wide load" not in order[tell:last]
    assert tell < order.index("let start") < wait, "the next kernel may get ready meanwhile, once peers are told"
    rest = order[last + 1 :]
    assert rest[0] == "barrier"
    assert rest.count("wide load") == 3, "one of each peer"


def test_a_norm_reads_what_its_product_lacks_beside_it(compiled: Compiled) -> None:
    """One load more, behind the wait, and nothing else."""
    (order, registers), (plain, fewest) = compiled["norm and delta"], compiled["norm"]
    wait = plain.index("wait")
    assert order == [*plain[: wait + 1], "wide load", *plain[wait + 1 :]]
    assert 0 < registers <= fewest + 8


def test_an_expand_behind_its_shrink_reads_y_at_once(code: Code) -> None:
    """And the rows of B, in each branch: only h is waited for."""
    order = code["expand"]
    # The first wait is that of programs that have nothing to do.
    assert order[: 1 + 16 + 1] == ["wait", *["narrow load"] * 16, "wait"]
    first = order.index("wide load")
    assert order[first : first + 10] == ["wide load"] * 9 + ["wait"]


def test_a_delta_reads_rows_of_b_ahead_of_h(compiled: Compiled) -> None:
    """In loads of 16 bytes but for odd sizes; what writes zeros alone waits too.

    A thread has 8 columns of 16 rows. Packed blocks have half as many rows, and an odd B one: they cost no registers.
    """
    order, registers = compiled["delta"]
    runs = [(kind, len([*run])) for kind, run in groupby(kind for kind in order if kind != "barrier")]
    assert runs[-2:] == [("wait", 1), ("wide store", 1)]
    branches = [runs[at : at + 3] for at in range(0, len(runs) - 2, 3)]
    assert [branch[1:] for branch in branches] == [[("wait", 1), ("let start", 1)]] * 3
    assert sorted(branch[0] for branch in branches) == [("narrow load", 8), ("wide load", 8), ("wide load", 16)]
    assert 0 < registers <= 170, "three programs a multiprocessor"


def test_an_activation_is_short(compiled: Compiled) -> None:
    """Gate, up and what they lack in loads of 16 bytes, all behind the wait: the kernels ahead write them."""
    order, registers = compiled["swiglu"]
    assert order == ["wait", "let start", *["wide load"] * 4, "wide store"]
    assert 0 < registers <= 40


def test_a_rotation_is_short(compiled: Compiled) -> None:
    """Both halves of heads of y and of what it lacks, of cos and of sin, all behind the wait."""
    for kernel, loads in (("rotary", 8), ("rotary without delta", 6)):
        order, registers = compiled[kernel]
        assert order == ["wait", "let start", *["load of 8 bytes"] * loads, *["store of 8 bytes"] * 4]
        assert 0 < registers <= 40


def test_what_a_launch_is_measured_with_waits_first(code: Code) -> None:
    """Started early, as LoRA's kernels are; two at a time would cost less than any of those."""
    assert code["early"][:2] == ["wait", "let start"]


def test_delta_of_a_segment_reads_b_before_it_waits(compiled: Compiled) -> None:
    """And tokens by themselves lose no registers to it."""
    (order, registers), (_, by_token) = compiled["delta, mixed"], compiled["delta"]
    ahead = order[: order.index("wait")]
    assert ahead[:4] == ["wide load"] * 4
    assert ahead[4:] in (["barrier"], ["barrier"] * 2), "two in Triton 3.6"
    assert 0 < registers <= by_token + 8


def test_places_are_written_before_they_are_read(code: Code) -> None:
    """By other threads of the program: there is a barrier between."""
    accesses = [kind for kind, _ in groupby(code["group"])]
    written = accesses.index("store")
    assert accesses[written : written + 3] == ["store", "barrier", "load"]
