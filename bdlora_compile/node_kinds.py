"""What a node is to a reader, and what runs it."""

from collections.abc import Mapping
from typing import Literal

from torch.fx import Node

from bdlora_compile.collectives import WAIT, is_collective
from bdlora_compile.ir import ArgumentWeight, operator_name, record

Kind = Literal["collective", "lora-a", "lora-b", "lora", "product", "attention", "move", "input", "output", "other"]
"""What a node is to a reader: LoRA's first factor, its second, both in one operator; a product of the base; ..."""

_LORA_OPERATORS: Mapping[str, Kind] = {
    "bdlora::lora_shrink": "lora-a",
    "bdlora::lora_shrink_grouped": "lora-a",
    "bdlora::lora_lookup": "lora-a",
    "bdlora::lora_expand": "lora-b",
    "bdlora::lora_expand_": "lora-b",
    "bdlora::lora_apply": "lora",
    "bdlora::lora_apply_": "lora",
    "bdlora::lora_linear": "lora",
    "bdlora::lora_linear_beside": "lora",
    "bdlora::lora_linear_bridged": "lora",
    "bdlora::lora_no_delta": "lora",
}
_PRODUCTS = frozenset({"linear", "mm", "matmul", "addmm", "bmm", "baddbmm", "embedding"})
_MOVES = frozenset({
    "view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "getitem", "narrow", "slice",
    "select", "cat", "chunk", "split", "stack", "clone", "contiguous", "view_as", "flatten", "unflatten", "alias",
    "_unsafe_view", "layer_boundary", "to", "_to_copy", "copy_", "write_rows", WAIT, "bdlora::cache_update",
    "bdlora::cache_write_",
})  # fmt: skip

_ELSEWHERE = "(bf16, f16 on CUDA), else torch: runtime/ops.py"
_SHRINK = f"Triton: runtime/kernels/shrink.py {_ELSEWHERE}"
_EXPAND = f"Triton: runtime/kernels/expand.py {_ELSEWHERE}"
_APPLY = f"Triton: runtime/kernels/apply.py, one launch for few tokens {_ELSEWHERE}"
_ROTARY = "Triton: runtime/kernels/rotary.py (bf16, f16 on CUDA), else torch: runtime/rotary_op.py"
_BESIDE = "runtime/kernels/shrink.py and delta.py"
_KERNELS: Mapping[str, str] = {
    "bdlora::lora_shrink": _SHRINK,
    "bdlora::lora_shrink_grouped": _SHRINK,
    "bdlora::lora_lookup": "torch: runtime/embedding_ops.py",
    "bdlora::lora_expand": _EXPAND,
    "bdlora::lora_expand_": _EXPAND,
    "bdlora::lora_apply": _APPLY,
    "bdlora::lora_apply_": _APPLY,
    "bdlora::lora_linear": f"a product by the BLAS library, for few tokens beside {_BESIDE}",
    "bdlora::lora_linear_beside": f"a product by the BLAS library, for few tokens beside {_BESIDE}",
    "bdlora::lora_linear_bridged": "a product by the BLAS library, for few tokens beside an all-reduce through "
    f"symmetric memory between {_BESIDE}",
    "bdlora::lora_no_delta": "torch: zeros",
    "bdlora::swiglu": f"Triton: runtime/kernels/swiglu.py {_ELSEWHERE}",
    "bdlora::rotate_and_cache": _ROTARY,
    "bdlora::lora_work": "which rows each program of the LoRA kernels takes: runtime/kernels/group.py, or torch",
    "bdlora::token_grid": "torch: runtime/embedding_ops.py",
}
"""What runs our operators; where a node's kind says enough, `kernel_of` does."""


def kind_of(node: Node) -> Kind:
    """What a node is to a reader."""
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if is_collective(node):
        return "collective"
    name = operator_name(node)
    if name in _LORA_OPERATORS:
        return _LORA_OPERATORS[name]
    if name in _PRODUCTS:
        return _factor_of(node) or "product"
    if "attention" in name:
        return "attention"
    return "move" if name in _MOVES else "other"


def _factor_of(node: Node) -> Kind | None:
    """Which LoRA factor a product of a model of others reads, told by the parameter's name: for display alone."""
    for operand in node.all_input_nodes:
        while operand.op != "placeholder" and operator_name(operand) in _MOVES and len(operand.all_input_nodes) == 1:
            (operand,) = operand.all_input_nodes
        source = record(operand).source if operand.op == "placeholder" else None
        if isinstance(source, ArgumentWeight):
            name = source.parameter.lower()
            if "lora_a" in name or "lora_b" in name:
                return "lora-a" if "lora_a" in name else "lora-b"
    return None


def kernel_of(node: Node, kind: Kind) -> str:
    """What runs a node of that kind, as text."""
    if kind in ("input", "output"):
        return ""
    if kind == "collective":
        return "process group (NCCL, gloo)"
    name = operator_name(node)
    if name in _KERNELS:
        return _KERNELS[name]
    if kind in ("product", "lora-a", "lora-b"):
        return "BLAS library, or a template that Inductor chooses"
    if kind == "attention":
        return "attention kernel: runtime/attention.py"
    return "none of its own: Inductor joins it with its neighbours"
