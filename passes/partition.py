"""Place every value on the ranks, and insert the collectives that this needs; LoRA goes in as S-LoRA places it.

Column site (W cut on O):   Before:  y = linear(x, W)
                            After:   y = linear(x, W_k);  h = all_gather(shrink(x, A_k));  y = expand(y, h, B_k)
Row site (W cut on D):      Before:  y = linear(x, W)
                            After:   y = linear(x_k, W_k); h = all_reduce(shrink(x_k, A_k)); y = expand(y, h, B_k)
                                     y is a summand; the base all-reduce falls before its first use as a whole value
Embedding (W cut on V):     Before:  e = embedding(ids, W)
                            After:   own = ids - start; e = embedding(own if inside else 0, W_k) * inside
                                     with LoRA a row site: h = all_reduce(lookup(own, A_k)); e = expand(e, h, B_k)
Attention over rows:        Before:  o = attention(q, k, v, rows)
                            After:   o_k = attention(q_k, k_k, v_k, per_head(rows, kv heads of a rank))
Cache:                      Before:  k, v = cache_update(store, k, v, lengths, layer)
                            After:   cache_write_(keys, values, k, v, lengths); k, v = keys, values

Sources: Megatron-LM arXiv 1909.08053; S-LoRA arXiv 2311.03285 figure 4. Where no rule applies operands are gathered,
which is always right: every such gather is reported, and an error in strict mode.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from bdlora_compile import collectives
from bdlora_compile.errors import PassError, PlacementError
from bdlora_compile.ir import (
    Captured,
    Fact,
    Origin,
    WeightSource,
    fake_tensor,
    fake_value,
    is_tensor,
    operator_name,
    placeholders,
    record,
    set_record,
    tensor_operands,
)
from bdlora_compile.pass_manager import PassContext
from bdlora_compile.passes.lora_placement import LoraPlacement
from bdlora_compile.passes.placement_rules import Ruling, replicated, rule_for
from bdlora_compile.passes.rank_inputs import RankInputs
from bdlora_compile.passes.tag import weight_name
from bdlora_compile.placement import Partial, Placement, Replicate, Shard, local_shape
from bdlora_compile.plan import ModelPlan
from bdlora_compile.propagation import find_fake_mode
from bdlora_compile.report import PassStats, Refusal
from bdlora_compile.runtime import cache_ops  # noqa: F401  # registers the operator
from bdlora_compile.runtime.attention import per_head


@dataclass(frozen=True, slots=True)
class Partition:
    """Give every value a placement and every rank its shapes."""

    name: ClassVar[str] = "partition"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL, Fact.TAGGED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PARTITIONED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        if Fact.PARTITIONED in captured.facts:
            return PassStats()
        inputs = RankInputs(captured.graph, context.plan)
        work = _Partitioning(captured, context, inputs, LoraPlacement(captured, context.plan, inputs))
        for node in list(captured.graph.nodes):
            work.place(node)
        _cut_weights(captured.graph)
        if work.fallbacks and context.strict:
            raise _strict_error(work.fallbacks)
        return PassStats(matches=work.num_placed, refusals=work.fallbacks, notes={"gathers": len(work.fallbacks)})

    def verify(self, captured: Captured, context: PassContext) -> None:
        for node in captured.graph.nodes:
            _verify_local_shape(node)


_WHOLE = "whole_value"
"""Key of ``node.meta``: the whole value that a node stood for before it was cut; read by `verify` alone."""


@dataclass(slots=True)
class _Partitioning:
    """One walk over the graph in order; every operand is placed before its users."""

    captured: Captured
    context: PassContext
    inputs: RankInputs
    lora: LoraPlacement
    num_placed: int = 0
    fallbacks: list[Refusal] = field(default_factory=list)
    converted: dict[tuple[Node, Placement], Node] = field(default_factory=dict)
    tables: dict[tuple[Node, int], Node] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.captured.graph

    @property
    def plan(self) -> ModelPlan:
        return self.context.plan

    def place(self, node: Node) -> None:
        """Place one captured node."""
        self.num_placed += 1
        if node.op == "placeholder":
            self._place_placeholder(node)
        elif node.op == "output":
            self._require(node, [Replicate()] * len(tensor_operands(node)), "it is an output of the model")
        elif operator_name(node) == "bdlora::cache_update":
            self._place_cache_update(node)
        elif operator_name(node) == "bdlora::attention":
            self._place_attention(node)
        elif operator_name(node) == "embedding":
            self._place_embedding(node)
        elif operator_name(node) == "linear":
            self._place_linear(node)
        else:
            self._place_by_rule(node)

    # --- kinds of nodes ---------------------------------------------------------------------------------------------

    def _place_placeholder(self, node: Node) -> None:
        source = record(node).source
        if isinstance(source, WeightSource):
            set_record(node, placement=self.plan.placement_of(source.parameter))

    def _place_by_rule(self, node: Node) -> None:
        rule = rule_for(node)
        placements = [record(operand).placement for operand in tensor_operands(node)]
        is_whole = all(isinstance(placement, Replicate) for placement in placements)
        ruling = replicated(node, placements) if is_whole else None
        reason = f"there is no placement rule for {operator_name(node)}"
        if ruling is None and rule is not None:
            answer = rule(node, placements)
            needs = f"{operator_name(node)} needs another placement of it"
            ruling, reason = (answer, needs) if isinstance(answer, Ruling) else (None, answer)
        self._apply(node, ruling or replicated(node, placements), reason)

    def _apply(self, node: Node, ruling: Ruling, reason: str) -> None:
        self._require(node, ruling.operands, reason)
        for position, argument in ruling.sizes.items():
            node.update_arg(position, argument)  # type: ignore[arg-type]  # literals
        set_record(node, placement=ruling.output)
        node.meta[_WHOLE] = fake_value(node)

    def _place_linear(self, node: Node) -> None:
        bias = self._split_off_row_bias(node)
        self._place_by_rule(node)
        site = record(node).site
        result = self._add_lora(node, node.args[0], site) if site else node
        if weight_name(node) in self.plan.gathered and isinstance(record(result).placement, Shard):
            result = self._gather_logits(result)
        if bias is not None:
            bias.replace_input_with(node, result)
            self._place_by_rule(bias)

    def _split_off_row_bias(self, node: Node) -> Node | None:
        """A row site's bias is added once, to the sum, not by every rank to its summand."""
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        weight = node.args[1]
        is_row = isinstance(weight, Node) and record(weight).placement == Shard(1, self.plan.mesh.size)
        if not (is_row and isinstance(bias, Node)):
            return None
        node.args = (*node.args[:2], None)
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
        with self.graph.inserting_after(node):
            added = self.graph.call_function(operator.add, (node, bias))
        _stand_for(added, node, "partition")
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        return added

    def _gather_logits(self, logits: Node) -> Node:
        """The whole vocabulary on every rank, without the rows that pad it to a multiple of N."""
        placement = record(logits).placement
        assert isinstance(placement, Shard), "only cut logits are gathered"
        whole = fake_tensor(logits)
        with self.graph.inserting_after(logits):
            *_, gathered = nodes = self._insert_gather(logits, placement, Origin.BASE)
        result = gathered
        if whole.shape[placement.dim] % placement.pieces:
            with self.graph.inserting_after(gathered):
                size = int(whole.shape[placement.dim])
                result = self.graph.call_function(torch.narrow, (gathered, placement.dim, 0, size))
        _stand_for(result, logits, "partition")
        set_record(result, placement=Replicate())
        logits.replace_all_uses_with(result, delete_user_cb=lambda user: user not in nodes and user is not result)
        return result

    def _place_embedding(self, node: Node) -> None:
        ids, site = node.args[0], record(node).site
        if self._is_cut(node.args[1]):
            node, ids = self._cut_embedding(node)
        else:
            self._place_by_rule(node)
        if site:
            self._add_lora(node, ids, site)

    def _cut_embedding(self, node: Node) -> tuple[Node, Node]:
        """The summand that takes the place of an embedding, and the ids counted from this rank's first one."""
        ids, weight = node.args[0], node.args[1]
        assert isinstance(ids, Node), "an embedding's ids are a tensor"
        assert isinstance(weight, Node), "an embedding's weight is a tensor"
        length = -(-fake_tensor(weight).shape[0] // self.plan.mesh.size)
        own = self.inputs.indices(length, self.plan.mesh.size)
        with self.graph.inserting_before(node):
            call = self.graph.call_function
            start = call(operator.getitem, (own, 0))
            shifted = call(operator.sub, (ids, start))
            inside = call(operator.and_, (call(operator.ge, (shifted, 0)), call(operator.lt, (shifted, length))))
            row = call(torch.where, (inside, shifted, 0))
            # Padding index, norms and gradients of an embedding mean nothing at inference.
            rows = call(torch.nn.functional.embedding, (row, weight))
            summand = call(operator.mul, (rows, call(torch.unsqueeze, (inside, -1))))
        for made in (start, shifted, inside, *inside.all_input_nodes, row, rows, *summand.all_input_nodes):
            if made.op != "placeholder" and made is not ids:
                made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
                set_record(made, stage="partition")
        shifted.meta["example_value"] = fake_value(ids)
        _stand_for(summand, node, "partition")
        set_record(summand, placement=Partial())
        node.replace_all_uses_with(summand)
        self.graph.erase_node(node)
        return summand, shifted

    def _place_cache_update(self, node: Node) -> None:
        """Write this rank's heads at each row's own position, and read the whole cache."""
        store, k = node.args[:2]
        pieces = self._cache_pieces(store, k)
        cut: Placement = Shard(1, pieces) if pieces > 1 else Replicate()
        self._require(node, [Replicate(), cut, cut, Replicate()], "it writes to the cache")
        _, k, v, lengths, layer = node.args
        caches = [self.inputs.cache(store, layer, part, cut) for part in (0, 1)]
        with self.graph.inserting_before(node):
            self.graph.call_function(torch.ops.bdlora.cache_write_.default, (*caches, k, v, lengths))
        for user in list(node.users):
            cache = caches[int(user.args[1])]  # type: ignore[arg-type]  # getitem of a pair
            # Uses of the whole cache stand for the value with all heads, which rules need to see.
            view = self._alias(cache, user, cut)
            user.replace_all_uses_with(view)
            self.graph.erase_node(user)
        self.graph.erase_node(node)

    def _place_attention(self, node: Node) -> None:
        """Own heads over own kv heads, with a row table in which each of these is a sequence."""
        self._place_by_rule(node)
        _, k, _, rows, _ = node.args
        assert isinstance(k, Node), "keys are a tensor"
        assert isinstance(rows, Node), "a row table is a tensor"
        cut = record(k).placement
        own_heads = int(fake_tensor(k).shape[1]) // (cut.pieces if isinstance(cut, Shard) else 1)
        if own_heads == 1:
            return
        if (rows, own_heads) not in self.tables:
            # Before the layers, which share it.
            with self.graph.inserting_after(_last_of(self.graph, rows)):
                self.tables[rows, own_heads] = self.graph.call_function(per_head, (rows, own_heads))
            set_record(self.tables[rows, own_heads], stage="partition")
        node.update_arg(3, self.tables[rows, own_heads])

    # --- conversions ------------------------------------------------------------------------------------------------

    def _require(self, node: Node, wanted: Sequence[Placement], reason: str) -> None:
        """Convert the node's operands to the placements that it needs."""
        for operand, placement in zip(tensor_operands(node), wanted, strict=True):
            have = record(operand).placement
            if have == placement:
                continue
            if isinstance(have, Shard) and self.plan.mesh.size > 1:
                where = f"{node.name} ({operator_name(node)}) reading {operand.name} [{have}]"
                self.fallbacks.append(Refusal(where, reason))
            node.replace_input_with(operand, self._convert(operand, placement))

    def _convert(self, value: Node, placement: Placement) -> Node:
        """``value`` in another placement; made once, right after the value."""
        key = (value, placement)
        if key not in self.converted:
            self.converted[key] = self._insert_conversion(value, placement)
        return self.converted[key]

    def _insert_conversion(self, value: Node, placement: Placement) -> Node:
        have = record(value).placement
        if not isinstance(have, Replicate) and not isinstance(placement, Replicate):
            return self._convert(self._convert(value, Replicate()), placement)
        if isinstance(placement, Shard):
            # Made first: a new placeholder comes after those that are there, and the conversion after it.
            length = -(-fake_tensor(value).shape[placement.dim] // placement.pieces)
            own = self.inputs.indices(int(length), placement.pieces)
        with self.graph.inserting_after(_last_of(self.graph, value)):
            match have, placement:
                case Partial(), Replicate():
                    nodes = collectives.in_order(collectives.all_reduce(self.graph, value, self.plan.mesh))
                case Shard(), Replicate():
                    nodes = self._insert_gather(value, have, Origin.FALLBACK)
                case Replicate(), Shard(dim, _):
                    nodes = [self.graph.call_function(torch.index_select, (value, dim, own))]
                case _:
                    raise PassError(
                        f"value {value.name}",
                        found=f"placement {have}, wanted {placement}",
                        expected="a conversion between whole, cut and partial values",
                        remedy="report this with the graph",
                    )
        for node in nodes:
            node.meta["nn_module_stack"] = value.meta.get("nn_module_stack")
            set_record(node, stage="partition")
        _stand_for(nodes[-1], value, "partition")
        set_record(nodes[-1], placement=placement)
        return nodes[-1]

    def _insert_gather(self, value: Node, shard: Shard, origin: Origin) -> list[Node]:
        nodes = collectives.in_order(collectives.all_gather(self.graph, value, shard, self.plan.mesh))
        for node in nodes:
            node.meta["nn_module_stack"] = value.meta.get("nn_module_stack")
            set_record(node, origin=origin, stage="partition")
        return nodes

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _add_lora(self, y: Node, x: Argument, site: str) -> Node:
        result = self.lora.add(y, x, site)
        result.meta[_WHOLE] = fake_value(y)
        return result

    def _is_cut(self, weight: object) -> bool:
        return isinstance(weight, Node) and isinstance(record(weight).placement, Shard)

    def _cache_pieces(self, store: object, k: object) -> int:
        """Pieces of the kv heads: all heads over the heads of the cache that a rank passes."""
        assert isinstance(store, Node), "a cache is an input of the graph"
        assert isinstance(k, Node), "new keys are a tensor of the graph"
        all_heads, own_heads = int(fake_tensor(k).shape[1]), int(fake_tensor(store).shape[3])
        placement = record(k).placement
        pieces = placement.pieces if isinstance(placement, Shard) else 1
        if own_heads * pieces != all_heads:
            raise PlacementError(
                "key/value cache",
                found=f"{own_heads} heads a rank",
                expected=f"{all_heads // pieces} of the model's {all_heads} on {self.plan.mesh.size} ranks",
                remedy="make the cache with `bdlora_compile.make_cache(model, ...)`",
            )
        return pieces

    def _alias(self, cache: Node, stands_for: Node, cut: Placement) -> Node:
        with self.graph.inserting_before(stands_for):
            view = self.graph.call_method("view_as", (cache, cache))
        _stand_for(view, stands_for, "partition")
        set_record(view, placement=cut)
        return view


def _last_of(graph: Graph, value: Node) -> Node:
    """Where nodes that read ``value`` may begin: placeholders come first."""
    return placeholders(graph)[-1] if value.op == "placeholder" else value


def _cut_weights(graph: Graph) -> None:
    """Give weights the shapes of one rank; until here rules read the whole ones."""
    mode = find_fake_mode(graph)
    for node in placeholders(graph):
        info = record(node)
        if isinstance(info.source, WeightSource) and isinstance(info.placement, Shard):
            value = fake_tensor(node)
            node.meta[_WHOLE] = value
            with mode:
                shape = local_shape(tuple(value.shape), info.placement)
                node.meta["example_value"] = torch.empty(shape, dtype=value.dtype, device=value.device)


def _stand_for(made: Node, original: Node, stage: str) -> None:
    """``made`` takes the place of ``original``: same whole value, same module, same source line."""
    for key in ("example_value", "nn_module_stack", "stack_trace"):
        if key in original.meta:
            made.meta[key] = original.meta[key]
    made.meta[_WHOLE] = fake_value(original)
    set_record(made, site=record(original).site, stage=stage)


def _verify_local_shape(node: Node) -> None:
    """The propagated shape is the whole one cut as the placement says: checks every rule on every graph."""
    whole = node.meta.get(_WHOLE)
    if not (isinstance(whole, torch.Tensor) and is_tensor(node)):
        return
    placement = record(node).placement
    expected = local_shape(tuple(whole.shape), placement)
    found = tuple(fake_tensor(node).shape)
    # Symbols are batch and sequence lengths, which no placement cuts; one length may have several names.
    known = [(a, b) for a, b in zip(expected, found, strict=False) if isinstance(a, int) and isinstance(b, int)]
    if len(expected) != len(found) or any(a != b for a, b in known):
        raise PassError(
            f"node {node.name} ({operator_name(node)})",
            found=f"local shape {list(found)}",
            expected=f"{list(expected)} ({list(whole.shape)} placed {placement})",
            remedy="report this with the graph: a placement rule is wrong",
        )


def _strict_error(fallbacks: Sequence[Refusal]) -> PlacementError:
    first = fallbacks[0]
    more = f" and {len(fallbacks) - 1} more" if len(fallbacks) > 1 else ""
    return PlacementError(
        first.where + more,
        found=f"a gather that nobody asked for, because {first.reason}",
        expected="values that stay on their ranks (strict mode)",
        remedy="use the cache that `generate` or `bdlora_compile.make_cache` makes, or load with strict=False",
    )
