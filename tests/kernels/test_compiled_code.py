"""Kernels compiled for a GPU: how wide they load, who waits where, how many registers they have."""

import json
import os
import subprocess
import sys

import pytest

Code = dict[str, list[str]]


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[list[str], int]]:
    """By kernel what it does to memory, in the order of its code, and its registers (`compile_for_gpu.py`)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    return {name: (memory, registers) for name, (memory, registers) in json.loads(ran.stdout).items()}


@pytest.fixture
def code(compiled: dict[str, tuple[list[str], int]]) -> Code:
    """What each kernel does to memory."""
    return {name: memory for name, (memory, _) in compiled.items()}


@pytest.mark.parametrize(
    ("kernel", "most"),
    [("shrink", 96), ("expand", 96), ("apply", 120), ("shrink by segment", 80), ("expand by segment", 124)],
)
def test_seldom_branches_cost_no_registers(compiled: dict[str, tuple[list[str], int]], kernel: str, most: int) -> None:
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


def test_a_norm_with_lora_reads_factors_at_once(compiled: dict[str, tuple[list[str], int]]) -> None:
    """16 rows of B a thread, and 2 of A, in loads of 16 bytes ahead of the wait; they stay in registers."""
    order, registers = compiled["norm and LoRA"]
    wait = order.index("wait")
    assert order[:wait] == ["wide load"] * wait
    assert wait >= 16
    assert 0 < registers <= 128, "16 warps have no more"


@pytest.mark.parametrize("kernel", ["norm and LoRA of h", "norm and LoRA of h, a slice"])
def test_a_norm_with_a_given_h_reads_b_at_once(compiled: dict[str, tuple[list[str], int]], kernel: str) -> None:
    """16 rows of B a thread beside the norm's weight, in loads of 16 bytes ahead of the wait; then x and residual.

    Behind them come loads of 16 rows again, for larger ranks, and narrow ones, for odd sizes.
    """
    order, registers = compiled[kernel]
    wait = order.index("wait")
    assert order[:wait] == ["wide load"] * (1 + 16)
    assert order[wait + 1 : wait + 4] == ["wide load"] * 2 + ["barrier"]
    assert order.count("wide load") == 1 + 16 + 2 + 16 + 3
    assert order.count("narrow load") == 8
    assert 0 < registers <= 128, "16 warps have no more"


def test_an_expand_behind_a_product_waits_before_it_reads_y(code: Code) -> None:
    """In each branch; behind a shrink it reads y at once."""
    for kernel, waits in (("expand behind a product", True), ("expand", False)):
        order = code[kernel]
        # The first wait is that of programs that have nothing to do.
        first, second = order.index("narrow load"), order.index("wide load")
        assert order[:first] == ["wait"] * (1 + waits)
        assert (order[second - 1] == "wait") is waits


def test_an_activation_reads_factors_at_once(compiled: dict[str, tuple[list[str], int]]) -> None:
    """Four rows of all three, ahead of gate and up; without B there is room for five programs a multiprocessor."""
    for kernel, loads, most in (("swiglu", 12, 128), ("swiglu without expand", 4, 48)):
        order, registers = compiled[kernel]
        assert order[: order.index("wait") + 1] == ["wide load"] * loads + ["wait"]
        assert 0 < registers <= most


def test_a_rotation_reads_factors_at_once(compiled: dict[str, tuple[list[str], int]]) -> None:
    """Four rows of B, both halves of heads, ahead of y, cos and sin; seldom sizes cost no registers."""
    for kernel, loads, most in (("rotary", 4, 72), ("rotary without LoRA", 0, 48)):
        order, registers = compiled[kernel]
        wait = order.index("wait")
        assert order[: wait + 4] == ["wide load"] * loads + ["wait", "let start"] + ["load of 8 bytes"] * 2
        assert order.count("wait") == 1
        assert [kind for kind in order if "store" in kind] == ["store of 8 bytes"] * 4
        assert order[-8:-4] == ["load of 8 bytes"] * 4, "cos and sin"
        assert ("narrow load" in order) is (loads > 0)
        assert 0 < registers <= most


def test_a_product_whose_h_is_given_reads_x_behind_it(code: Code) -> None:
    """The kernel ahead writes both."""
    product = code["product with h"]
    assert product.count("wait") == 1
    assert product.index("wait") < product.index("load to shared memory")


def test_a_product_behind_its_shrink_reads_x_at_once(code: Code) -> None:
    """It was let start when x was there, and waits for h alone."""
    shrink, product = code["shrink"], code["product behind h"]
    assert shrink.index("wait") < shrink.index("let start")
    assert product.index("load to shared memory") < product.index("wait")


def test_a_product_of_wide_ranks_reads_the_rest_of_b_behind_h(code: Code) -> None:
    """Some rows ahead of its sums, in registers; the others in turns, through shared memory."""
    product = code["product of wide ranks"]
    wait = product.index("wait")
    assert "wide load" in product[:wait]
    assert "load to shared memory" in product[wait:]
