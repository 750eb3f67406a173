"""What the inspector says that a node is, and what runs it: every operator of LoRA is known."""

import pytest
import torch
from torch.fx import Graph

import bdlora_compile.backend  # noqa: F401  # registers the operators
from bdlora_compile.node_kinds import kernel_of, kind_of

HELPERS = {"bdlora::lora_work"}
"""It reads no factor."""
LORA = sorted({found.name for found in torch._C._jit_get_all_schemas() if found.name.startswith("bdlora::lora_")})


@pytest.mark.parametrize("name", LORA)
def test_operators_of_lora_are_no_others(name: str) -> None:
    packet = getattr(torch.ops.bdlora, name.removeprefix("bdlora::"))
    node = Graph().call_function(packet.default, ())
    kind = kind_of(node)
    assert (kind == "other") is (name in HELPERS)
    assert "runtime/" in kernel_of(node, kind) or "torch" in kernel_of(node, kind)


@pytest.mark.parametrize(("name", "kernel"), [("rotate_and_cache", "rotary.py"), ("swiglu", "swiglu.py")])
def test_readers_of_a_product_have_a_kernel(name: str, kernel: str) -> None:
    """They are no LoRA: they only add what lies beside the product."""
    node = Graph().call_function(getattr(torch.ops.bdlora, name).default, ())
    assert kind_of(node) == "other"
    assert f"runtime/kernels/{kernel}" in kernel_of(node, "other")


@pytest.mark.parametrize("name", ["lora_linear_beside", "lora_linear_bridged"])
def test_products_beside_their_lora_name_its_kernels(name: str) -> None:
    node = Graph().call_function(getattr(torch.ops.bdlora, name).default, ())
    assert kind_of(node) == "lora"
    assert "runtime/kernels/shrink.py and delta.py" in kernel_of(node, "lora")


def test_others_are_joined_by_inductor() -> None:
    assert len(LORA) >= 10
    node = Graph().call_function(torch.add, ())
    assert (kind_of(node), kernel_of(node, "other")[:15]) == ("other", "none of its own")
