"""What the inspector says that a node is, and what runs it: every operator of LoRA is known."""

import pytest
import torch
from torch.fx import Graph

import bdlora_compile.backend  # noqa: F401  # registers the operators
from bdlora_compile.node_kinds import kernel_of, kind_of

HELPERS = {"bdlora::lora_work", "bdlora::lora_counters"}
"""They read no factor."""
LORA = sorted({found.name for found in torch._C._jit_get_all_schemas() if found.name.startswith("bdlora::lora_")})


@pytest.mark.parametrize("name", LORA)
def test_operators_of_lora_are_no_others(name: str) -> None:
    packet = getattr(torch.ops.bdlora, name.removeprefix("bdlora::"))
    node = Graph().call_function(packet.default, ())
    kind = kind_of(node)
    assert (kind == "other") is (name in HELPERS)
    assert "runtime/" in kernel_of(node, kind) or "torch" in kernel_of(node, kind)


def test_rotations_have_a_kernel() -> None:
    """With LoRA or without."""
    for name, wanted in (("rotate_and_cache", "other"), ("rotate_and_cache_lora", "lora-b")):
        node = Graph().call_function(getattr(torch.ops.bdlora, name).default, ())
        assert kind_of(node) == wanted
        assert "runtime/kernels/rotary.py" in kernel_of(node, kind_of(node))


def test_others_are_joined_by_inductor() -> None:
    assert len(LORA) >= 10
    node = Graph().call_function(torch.add, ())
    assert (kind_of(node), kernel_of(node, "other")[:15]) == ("other", "none of its own")
