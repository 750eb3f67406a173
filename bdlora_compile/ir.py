"""The intermediate representation: an FX graph whose nodes carry one typed record each.

The graph is the same on every rank. What differs between ranks (slices of weights, adapter banks, offsets) enters by
placeholders, and each placeholder's record says where its value comes from. So all ranks issue the same collectives
in the same order by construction, and one pipeline run serves every rank.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from bdlora_compile.declared import Declaration
from bdlora_compile.errors import PassError
from bdlora_compile.placement import Placement, Replicate

_RECORD = "bdlora"
"""Key of ``node.meta``: the node's record."""
_KEY = "bdlora_key"
"""Key of ``node.meta``: the node's stable name, which no pass reads (see `node_names.py`)."""


class Fact(Enum):
    """What passes establish about a graph, and what later passes require."""

    CANONICAL = "canonical"
    """No bookkeeping nodes; sizes that are known are literals."""
    TAGGED = "tagged"
    """Every LoRA site in the graph is marked at its linear node."""
    DEDUPLICATED = "deduplicated"
    """Of layers that are alike the graph holds one, between boundaries."""
    PARTITIONED = "partitioned"
    """Every value has a placement; shapes are those of one rank; LoRA is in S-LoRA placement."""
    LORA_LOCAL = "lora-local"
    """Every site whose layout is local has no collective between its factors."""
    FOLDED = "folded"
    """No two all-reduces feed one addition."""
    MERGED = "merged"
    """Layers that share an input are one product."""
    FUSED = "fused"
    """A LoRA path without a collective is one operator that adds in place."""
    BASE_ONLY = "base-only"
    """No LoRA node: the graph of a batch in which no row has an adapter."""


@dataclass(frozen=True, slots=True)
class InputSource:
    """The value is argument ``index`` of the captured function.

    ``rank_local``: every rank passes its own tensor (a cache of this rank's heads), not the same value.
    """

    index: int
    rank_local: bool = False


@dataclass(frozen=True, slots=True)
class CacheSource:
    """The value is the keys (``part`` 0) or values (1) of one layer of the cache that argument ``index`` holds."""

    index: int
    layer: int
    part: int


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The value is this rank's slice of a parameter; its placement is the record's."""

    parameter: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MergedSource:
    """The value is this rank's slices of several parameters, one below the other, each with its placement."""

    parts: tuple[tuple[str, Placement], ...]


class BankField(Enum):
    """The tensors of an adapter bank."""

    POOL = "pool"
    SLOTS = "slots"
    SCALES = "scales"
    TOKEN_SLOT = "token_slot"


@dataclass(frozen=True, slots=True)
class BankSource:
    """The value is a tensor of this rank's adapter bank.

    ``layer``: only the rows of the sites of that layer (a module path), for slots and scales; None is all rows.
    """

    field: BankField
    layer: str | None = None


@dataclass(frozen=True, slots=True)
class SymmetricSource:
    """The value is the memory of this rank that its peers read, uint8; all-reduces go through it."""


@dataclass(frozen=True, slots=True)
class MailboxSource:
    """The value is the memory of this rank through which all-reduces with a norm go, int64."""


@dataclass(frozen=True, slots=True)
class RankIndices:
    """The value is the indices of the piece that this rank owns, int64 [length], of a dim cut into ``pieces``."""

    length: int
    pieces: int


@dataclass(frozen=True, slots=True)
class ArgumentWeight:
    """The value is argument ``index`` of the call: this rank's part of a parameter of a model that others sharded.

    ``declared``: what its owner says of it (see `declared.py`).
    """

    index: int
    parameter: str
    declared: Declaration | None = None


@dataclass(frozen=True, slots=True)
class RebuiltSource:
    """The value is this rank's columns of a factor of which it holds rows, [r, O]; rebuilt once by an all-to-all.

    Attributes:
        parameter: the factor that the ranks hold rows of.
        index: its argument's place.
        rank_dim: the dim of the argument that is the adapter's rank.
        columns: for each rank the places along that dim that it needs.
        group: the process group.
    """

    parameter: str
    index: int
    rank_dim: int
    columns: tuple[tuple[int, ...], ...]
    group: str


@dataclass(frozen=True, slots=True)
class CarriedSource:
    """The value is what the region before handed on, number ``index`` of it (see `regions.py`)."""

    index: int = 0


@dataclass(frozen=True, slots=True)
class SharedSource:
    """The value was computed before the layers, which all read it: result ``index`` of the first region."""

    index: int


Source = (
    InputSource
    | CacheSource
    | WeightSource
    | MergedSource
    | BankSource
    | SymmetricSource
    | MailboxSource
    | RankIndices
    | ArgumentWeight
    | RebuiltSource
    | CarriedSource
    | SharedSource
)


class Origin(Enum):
    """What a node computes for; the census and the inspector sort by it."""

    BASE = "base"
    LORA = "lora"
    FALLBACK = "fallback"
    """A gather that no rule asked for."""


WHOLE = Replicate()
"""The placement of what no pass has cut."""


@dataclass(frozen=True, slots=True)
class Record:
    """What the compiler knows of a node.

    Attributes:
        placement: where the value lies on the ranks.
        origin: what the node computes for.
        site: name of the LoRA site that the node belongs to.
        source: where a placeholder's value comes from.
        stage: name of the pass that made the node, empty for captured ones.
    """

    placement: Placement = WHOLE
    origin: Origin = Origin.BASE
    site: str | None = None
    source: Source | None = None
    stage: str = ""


def record(node: Node) -> Record:
    """The node's record (the default one if no pass wrote it)."""
    found = node.meta.get(_RECORD, Record())
    assert isinstance(found, Record), f"{node.name}: meta[{_RECORD!r}] is a {type(found).__name__}, not a Record"
    return found


def set_record(node: Node, **changes: object) -> None:
    """Change fields of the node's record."""
    node.meta[_RECORD] = replace(record(node), **changes)  # type: ignore[arg-type]  # checked by the dataclass


def has_record(node: Node) -> bool:
    """Whether a pass wrote a record on the node."""
    return _RECORD in node.meta


def node_key(node: Node) -> str:
    """The node's stable name, empty if it has none yet."""
    return str(node.meta.get(_KEY, ""))


def set_node_key(node: Node, key: str) -> None:
    """Give the node its stable name."""
    node.meta[_KEY] = key


def fake_value(node: Node) -> object:
    """The fake value that Dynamo or the last propagation gave the node."""
    return node.meta.get("example_value")


def fake_tensor(node: Node) -> torch.Tensor:
    """The node's fake tensor.

    Raises:
        PassError: the node's value is not a tensor.
    """
    value = fake_value(node)
    if isinstance(value, torch.Tensor):
        return value
    raise PassError(
        f"node {node.name}",
        found=f"a value of type {type(value).__name__}",
        expected="a tensor",
        remedy="report this with the graph: a pass placed a value that is no tensor",
    )


def is_tensor(node: Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(fake_value(node), torch.Tensor)


def operator_name(node: Node) -> str:
    """One name for an operator however it was called: ``add`` for operator.add, torch.add and Tensor.add.

    Operators of a library keep their namespace: ``bdlora::lora_shrink``.
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, name = str(target._qualified_op_name).split("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    name = getattr(target, "__name__", str(target))
    return name.strip("_") if name.startswith("__") else name


def is_symbol(node: Node) -> bool:
    """Whether the node's value is a symbolic number."""
    return isinstance(fake_value(node), torch.SymInt)


def tensor_operands(node: Node) -> list[Node]:
    """Operands that are tensors (or tuples of them), each once."""
    numbers = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    return [operand for operand in node.all_input_nodes if not isinstance(fake_value(operand), numbers)]


def placeholders(graph: Graph) -> Sequence[Node]:
    """The graph's placeholders in order."""
    return graph.find_nodes(op="placeholder")


def insert_placeholder(graph: Graph, name: str, value: object, **facts: object) -> Node:
    """A placeholder behind the others, with its value and the fields of its record."""
    with graph.inserting_after(placeholders(graph)[-1]):
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    set_record(node, **facts)
    return node


def module_path(node: Node) -> str:
    """Path of the innermost module that the node was captured in, for example ``model.layers.3.self_attn``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return plain_path(str(path))


def layer_of(path: str) -> str | None:
    """The decoder layer of a module path: ``model.layers.3`` of ``model.layers.3.mlp``; None outside layers."""
    parts = path.split(".")
    for index, part in enumerate(parts[1:], start=1):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return None


_CONTAINERS = frozenset({"_modules", "_parameters", "_buffers", "__dict__"})


def plain_path(source: str) -> str:
    """``L['self']._modules['model']._modules['layers']._modules['3']`` and ``L['self'].model.layers[3]`` alike."""
    inner = source.split("]", 1)[1] if source.startswith("L[") else source
    return ".".join(part for part in re.findall(r"\w+", inner) if part not in _CONTAINERS)


def stage_nodes(graph: Graph, name: str) -> Iterator[Node]:
    """Call nodes of one operator, by `operator_name`."""
    return (node for node in graph.nodes if node.op.startswith("call_") and operator_name(node) == name)


@dataclass(frozen=True, slots=True)
class Layers:
    """A model's decoder layers, and which of them the graph holds.

    Attributes:
        prefix: module path of their list, for example ``model.layers``.
        stands_in: for each layer the number of the layer in the graph that is like it.
    """

    prefix: str
    stands_in: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the layers that the graph holds, in order."""
        return tuple(sorted(set(self.stands_in)))

    def path(self, number: int) -> str:
        """Module path of a layer."""
        return f"{self.prefix}.{number}"


@dataclass(slots=True)
class Captured:
    """A graph on its way through the passes, with what holds for all of it.

    Attributes:
        module: what the graph's attributes belong to.
        graph: the FX graph.
        facts: what has been established.
        token_input: placeholder whose first two dims are the [batch, seq] of the forward.
        layers: which layers the graph holds, None if it holds them all.
    """

    module: nn.Module
    graph: Graph
    facts: frozenset[Fact] = frozenset()
    token_input: Node | None = None
    layers: Layers | None = None

    def copy(self) -> "Captured":
        """The same graph in nodes of its own."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        graph.output(graph.graph_copy(self.graph, copies))
        token_input = copies[self.token_input] if self.token_input is not None else None
        return replace(self, graph=graph, token_input=token_input)

    def layer_of_site(self, site: str) -> str | None:
        """The layer whose rows of the adapter tables a site's operators see; None if they see all rows."""
        return layer_of(site) if self.layers is not None else None


def replace_by_literal(node: Node, value: int) -> None:
    """Put a number in place of every use of ``node``."""

    def swap(operand: Node) -> Node | int:
        return value if operand is node else operand

    for user in list(node.users):
        user.args = map_arg(user.args, swap)
        user.kwargs = map_arg(user.kwargs, swap)
