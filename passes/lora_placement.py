"""LoRA as S-LoRA places it: what partitioning adds to the product of a site.

Column site:  h = all_gather(shrink(x, A_k));   y = expand(y, h, B_k)
Row site:     h = all_reduce(shrink(x_k, A_k)); y = expand(y, h, B_k)
Embedding:    h = all_reduce(lookup(ids - start, A_k)); y = expand(y, h, B_k)         a row site whose x is one-hot

Source: S-LoRA arXiv 2311.03285 figure 4. Legend: k this rank, A_k and B_k its parts (see `factors.py`).
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from bdlora_compile import collectives
from bdlora_compile.errors import PlacementError
from bdlora_compile.factors import Layout, local_features, rank_capacity
from bdlora_compile.ir import (
    BankField,
    Captured,
    Origin,
    fake_tensor,
    fake_value,
    operator_name,
    record,
    set_record,
)
from bdlora_compile.lora_nodes import ExpandArguments, LookupArguments, ShrinkArguments
from bdlora_compile.passes.rank_inputs import RankInputs
from bdlora_compile.placement import Shard
from bdlora_compile.plan import ModelPlan
from bdlora_compile.propagation import number_key
from bdlora_compile.runtime import embedding_ops  # noqa: F401 - registers its operators
from bdlora_compile.sites import Role, Site


@dataclass(frozen=True, slots=True)
class LoraPlacement:
    """Adds LoRA paths to a graph that is being partitioned."""

    captured: Captured
    plan: ModelPlan
    inputs: RankInputs

    @property
    def graph(self) -> Graph:
        return self.captured.graph

    def add(self, y: Node, x: Argument, site_name: str) -> Node:
        """Shrink, collective, expand, as S-LoRA places them; returns the node that stands for the site's result."""
        site, plan = self.plan.sites[site_name], self.plan
        assert isinstance(x, Node), "a layer's input is a tensor"
        layer = self.captured.layer_of_site(site_name)
        bank = {field: self.inputs.bank(field, layer) for field in BankField}
        pool, slots, scales = bank[BankField.POOL], bank[BankField.SLOTS], bank[BankField.SCALES]
        tokens = self._kept_tokens(x, bank[BankField.TOKEN_SLOT], site)
        index = plan.row(site_name, layer)
        width = rank_capacity(plan.max_rank, site, Layout.SLORA, plan.mesh)
        in_features, out_features = local_features(site, Layout.SLORA, plan.mesh)
        is_gathered = site.role is Role.COLUMN and plan.mesh.size > 1
        with self.graph.inserting_after(y):
            if site.is_lookup:
                shrink = LookupArguments(x, pool, slots, tokens, [index], width, in_features).insert(self.graph)
            else:
                shrink = ShrinkArguments(x, pool, slots, tokens, [index], width).insert(self.graph)
        self._mark(shrink, y, site_name)
        h = self._bridge(shrink, y, site_name, site.role)
        parts = plan.mesh.size if is_gathered else 1
        with self.graph.inserting_after(h):
            arguments = ExpandArguments(y, h, pool, slots, scales, tokens, [index], [out_features], parts)
            expand = arguments.insert(self.graph)
        self._mark(expand, y, site_name)
        set_record(expand, placement=record(y).placement)
        expand.meta["example_value"] = fake_value(y)
        y.replace_all_uses_with(expand, delete_user_cb=lambda user: user is not expand)
        return expand

    def _kept_tokens(self, x: Node, token_slot: Node, site: Site) -> Node:
        """Slots of the tokens that ``x`` holds: `generate` asks for the logits of each row's last token alone.

        Raises:
            PlacementError: ``x`` holds some of the forward's tokens, and not by indexing the hidden state.
        """
        if not site.vocabulary or (self._holds_all_tokens(x) and not _is_indexed(x)):
            return token_slot
        source, index = x.args[:2] if operator_name(x) == "getitem" else (None, None)
        if not (isinstance(source, Node) and self._holds_all_tokens(source) and isinstance(index, tuple)):
            raise PlacementError(
                f"LoRA site {site.name}",
                found=f"an input that {operator_name(x)} makes, of shape {list(fake_tensor(x).shape)}",
                expected="the hidden state [batch, seq, D], or some of its tokens chosen by hidden[:, index, :]",
                remedy="report this model; without vocabulary_lora it is served",
            )
        with self.graph.inserting_after(x):
            grid = self.graph.call_function(torch.ops.bdlora.token_grid.default, (token_slot, source))
        with self.graph.inserting_after(grid):
            kept = self.graph.call_function(operator.getitem, (grid, index[:2]))
        with self.graph.inserting_after(kept):
            flat = self.graph.call_function(torch.flatten, (kept,))
        # Of several rows they lie apart, and kernels read them as if they lay together.
        with self.graph.inserting_after(flat):
            tokens = self.graph.call_function(torch.clone, (flat,), {"memory_format": torch.contiguous_format})
        for node in (grid, kept, flat, tokens):
            self._mark(node, x, site.name)
        return tokens

    def _holds_all_tokens(self, x: Node) -> bool:
        """Whether the leading dims of ``x`` are the [batch, seq] of the forward."""
        token_input = self.captured.token_input
        assert token_input is not None, "the tag pass finds the token input"
        own, all_tokens = fake_tensor(x).shape[:2], fake_tensor(token_input).shape[:2]
        return [number_key(size) for size in own] == [number_key(size) for size in all_tokens]

    def _bridge(self, shrink: Node, y: Node, site_name: str, role: Role) -> Node:
        """The collective between the factors: ranks' shares of h side by side, or ranks' summands of h summed."""
        if self.plan.mesh.size == 1:
            return shrink
        with self.graph.inserting_after(shrink):
            if role is Role.COLUMN:
                whole = Shard(1, self.plan.mesh.size)
                nodes = collectives.in_order(collectives.all_gather(self.graph, shrink, whole, self.plan.mesh))
            else:
                nodes = collectives.in_order(collectives.all_reduce(self.graph, shrink, self.plan.mesh))
        for node in nodes:
            self._mark(node, y, site_name)
        return nodes[-1]

    def _mark(self, node: Node, y: Node, site_name: str) -> None:
        node.meta["nn_module_stack"] = y.meta.get("nn_module_stack")
        set_record(node, origin=Origin.LORA, site=site_name, stage="partition")


def _is_indexed(x: Node) -> bool:
    """Whether ``x`` holds tokens in the order of a tensor of indices; slices keep the order that they find."""
    index = x.args[1] if operator_name(x) == "getitem" else ()
    return any(isinstance(part, Node) for part in index) if isinstance(index, tuple) else False
