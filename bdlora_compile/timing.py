"""Estimated times: the formulas of `cost.py` in numbers, at the constants of a machine.

A group is what the merge pass makes one call of: sites that read one x (q/k/v; gate/up), or one site (o; down).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

import sympy

from bdlora_compile import cost
from bdlora_compile.collective_cost import Way, way_of, ways
from bdlora_compile.cost import Formula, value_of
from bdlora_compile.errors import ConfigError
from bdlora_compile.factors import Layout
from bdlora_compile.ir import layer_of
from bdlora_compile.machine import Machine
from bdlora_compile.placement import Mesh, site_pieces
from bdlora_compile.runtime.adapter_targets import FactorKind
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.sites import Role, Site

Numbers = Mapping[sympy.Symbol, int | sympy.Rational]


@dataclass(frozen=True, slots=True)
class Workload:
    """The load that a layout is chosen for.

    Attributes:
        tokens: tokens of a forward: rows that decode together.
        adapters: distinct adapters among them.

    Raises:
        ConfigError: a number is below 1, or there are more adapters than tokens.
    """

    tokens: int = 16
    adapters: int = 16

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 1 <= self.adapters <= self.tokens:
            raise ConfigError(
                "workload",
                found=f"{self.tokens} tokens, {self.adapters} adapters",
                expected="at least one of each, and no more adapters than tokens",
                remedy="count the rows that decode together and the different adapters among them",
            )


@dataclass(frozen=True, slots=True)
class Declared:
    """What an adapter declares of one site: which factor is block-diagonal, R, and G (1 for an ordinary one)."""

    kind: FactorKind
    rank: int
    nblocks: int

    def blocks_on_split_dim(self, role: Role) -> int:
        """G where the blocks lie along the dim that ranks split, else 1: the adapter is served as an ordinary one."""
        return self.nblocks if self.kind is _aligned(role) else 1

    @classmethod
    def along_split_dim(cls, role: Role, rank: int, nblocks: int) -> "Declared":
        """An adapter's site whose blocks lie along the dim that ranks split; of one block an ordinary one."""
        return cls(FactorKind.DENSE if nblocks == 1 else _aligned(role), rank, nblocks)


def _aligned(role: Role) -> FactorKind:
    return FactorKind.BLOCK_B if role is Role.COLUMN else FactorKind.BLOCK_A


Profile = Mapping[str, Declared]
"""What one adapter declares, by site."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Estimated time of one group in one forward on the fullest rank, by part.

    Attributes:
        memory: bytes read and written, at the machine's bandwidth.
        compute: multiplications and additions, at its rate.
        kernels: the larger of both, group by group: a kernel reads while it computes.
        launches: kernels, at its cost of one.
        latency: of the collective.
        wire: bytes of the collective, at the bandwidth of its link.
        hidden: of the collective's time, what a product that runs beside it takes anyway.
    """

    memory: float = 0.0
    compute: float = 0.0
    kernels: float = 0.0
    launches: float = 0.0
    latency: float = 0.0
    wire: float = 0.0
    hidden: float = 0.0

    @property
    def exchange(self) -> float:
        """The collective alone."""
        return self.latency + self.wire

    @property
    def total(self) -> float:
        """Kernels and what is seen of the collective, one after the other."""
        return self.kernels + self.launches + self.exchange - self.hidden

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def times(self, count: int) -> "Seconds":
        """The parts of ``count`` groups alike."""
        return Seconds(*(count * getattr(self, part.name) for part in fields(self)))

    def text(self) -> str:
        """``12.3 us (memory 1.0, launches 1.2, ...)``."""
        parts = ((part.name, getattr(self, part.name) * 1e6) for part in fields(self) if part.name != "kernels")
        shown = ", ".join(f"{name} {value:.1f}" for name, value in parts if value >= 0.05)
        return f"{self.total * 1e6:.1f} us" + (f" ({shown})" if shown else "")


@dataclass(frozen=True, slots=True)
class Terms:
    """What a cost is estimated from, beside the sites.

    Attributes:
        mesh: the ranks.
        workload: tokens and adapters of a forward.
        machine: its constants.
        max_rank: largest rank that the bank admits.
        element_size: bytes of an element of weights, factors and activations.
    """

    mesh: Mesh
    workload: Workload
    machine: Machine
    max_rank: int
    element_size: int


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites that share an input: the same in every layer.

    Attributes:
        label: ``model.layers.*.mlp.gate_proj+up_proj``.
        layers: for each layer its sites, in module order.
    """

    label: str
    layers: Sequence[Sequence[Site]]

    @property
    def sites(self) -> Sequence[Site]:
        """Those of the first layer, which stand for all."""
        return self.layers[0]


def group_sites(sites: Mapping[str, Site]) -> list[SiteGroup]:
    """Groups in the order of their first site: column sites of one module together, row sites alone."""
    inputs: dict[tuple[str, Role, str], list[Site]] = {}
    for site in sites.values():
        module, _, own = site.name.rpartition(".")
        inputs.setdefault((module, site.role, "" if site.role is Role.COLUMN else own), []).append(site)
    alike: dict[tuple[object, ...], list[list[Site]]] = {}
    for members in inputs.values():
        shapes = tuple(replace(site, name="", tied_weight=None) for site in members)
        alike.setdefault((_label(members), shapes), []).append(members)
    return [SiteGroup(str(label), layers) for (label, _), layers in alike.items()]


def lora_seconds(group: SiteGroup, layout: Layout, profiles: Sequence[Profile], terms: Terms) -> Seconds:
    """Estimated LoRA time of a group in one layer, on the fullest rank, for the mean of the adapters."""
    members = lora_members(group, layout, profiles, terms)
    exchange = _exchange(members, terms)
    own = _seconds(members, exchange, terms)
    if exchange is None or not exchange[0].is_symmetric or terms.workload.tokens > BY_TOKEN_LIMIT:
        return own
    # The vocabulary's products have none beside them: their seconds are none here.
    product = base_seconds(group, terms)
    return replace(own, hidden=min(own.exchange, product.kernels + product.launches))


def lora_members(
    group: SiteGroup, layout: Layout, profiles: Sequence[Profile], terms: Terms
) -> list[tuple[Formula, Numbers]]:
    """Formula and numbers of the LoRA of each site of a group."""
    members: list[tuple[Formula, Numbers]] = []
    for position, site in enumerate(group.sites):
        a, b = _mean_elements(group, position, layout, profiles, terms)
        formula = cost.lookup(layout) if site.is_lookup else cost.lora(site.role, layout)
        members.append((formula, _numbers(site, terms) | {cost.A: a, cost.B: b}))
    return members


def base_seconds(group: SiteGroup, terms: Terms) -> Seconds:
    """Estimated time of a group's linear layers in one layer; the vocabulary's are counted outside the layers."""
    members = base_members(group, terms)
    return formula_seconds(members, terms) if members else Seconds()


def base_members(group: SiteGroup, terms: Terms) -> list[tuple[Formula, Numbers]]:
    """Formula and numbers of the linear layers of a group; none for the vocabulary's."""
    if group.sites[0].vocabulary:
        return []
    return [(cost.base(site.role), _numbers(site, terms)) for site in group.sites]


def formula_seconds(members: Sequence[tuple[Formula, Numbers]], terms: Terms) -> Seconds:
    """Estimated time of formulas that make one group: x once, one launch of each kernel, one collective."""
    return _seconds(members, _exchange(members, terms), terms)


def _seconds(members: Sequence[tuple[Formula, Numbers]], exchange: tuple[Way, float] | None, terms: Terms) -> Seconds:
    machine = terms.machine
    (first, own), *_ = members
    moved = value_of(first.x_reads, own) + _total(members, lambda formula: formula.reads + formula.writes)
    latency, wire = (exchange[0].link.latency, exchange[0].wire_seconds(exchange[1])) if exchange else (0.0, 0.0)
    memory = float(moved) / machine.memory_bandwidth
    compute = float(_total(members, lambda formula: formula.flops)) / machine.flops
    return Seconds(
        memory,
        compute,
        max(memory, compute),
        float(value_of(first.launches, own)) * machine.launch,
        latency,
        wire,
    )


def exchange_ways(members: Sequence[tuple[Formula, Numbers]], terms: Terms) -> Sequence[Way]:
    """How a group's collective may go on the machine, the first that takes its payload; none where there is none."""
    exchange = members[0][0].exchange
    if exchange is None or terms.mesh.size == 1:
        return []
    return ways(terms.machine, exchange.kind, terms.mesh.size, is_sum=exchange.is_sum)


def _exchange(members: Sequence[tuple[Formula, Numbers]], terms: Terms) -> tuple[Way, float] | None:
    """The way of a group's collective, and its payload in bytes."""
    choices = exchange_ways(members, terms)
    if not choices:
        return None
    payload = _total(members, lambda formula: formula.exchange.payload if formula.exchange else sympy.Integer(0))
    return way_of(choices, float(payload)), float(payload)


def _total(members: Sequence[tuple[Formula, Numbers]], part: Callable[[Formula], sympy.Expr]) -> sympy.Rational:
    return sympy.Add(*(value_of(part(formula), numbers) for formula, numbers in members))


def declared_elements(site: Site, declared: Declared, layout: Layout, mesh: Mesh) -> tuple[int, int]:
    """Elements of A and B of one adapter's site on the rank that holds most of them."""
    blocks = declared.blocks_on_split_dim(site.role)
    pieces = site_pieces(site, mesh)
    return _elements(site.role, layout, site.in_features, site.out_features, declared.rank, blocks, mesh.size, pieces)


def pattern_of(path: str) -> str:
    """``model.layers.*.mlp.up_proj`` of ``model.layers.3.mlp.up_proj``."""
    layer = layer_of(path)
    return path if layer is None else path.replace(f"{layer}.", f"{layer.rpartition('.')[0]}.*.", 1)


def _mean_elements(
    group: SiteGroup, position: int, layout: Layout, profiles: Sequence[Profile], terms: Terms
) -> tuple[sympy.Rational, sympy.Rational]:
    """Elements of A and B at one site of the group, a mean over adapters and layers; an adapter without it counts."""
    site = group.sites[position]
    names = [layer[position].name for layer in group.layers]
    if not profiles:
        counts = Counter({Declared(FactorKind.DENSE, terms.max_rank, 1): 1})
        total = 1
    else:
        counts = Counter(profile[name] for profile in profiles for name in names if name in profile)
        total = len(profiles) * len(names)
    found = [(declared_elements(site, declared, layout, terms.mesh), n) for declared, n in counts.items()]
    a, b = (sum(pair[factor] * n for pair, n in found) for factor in (0, 1))
    return sympy.Rational(a, total), sympy.Rational(b, total)


@cache
def _elements(
    role: Role, layout: Layout, d: int, o: int, rank: int, blocks: int, ranks: int, pieces: int
) -> tuple[int, int]:
    formula = cost.elements(role, layout)
    numbers = {cost.D: d, cost.O: o, cost.R: rank, cost.G: blocks, cost.N: ranks, cost.M: pieces}
    by_piece = [
        [int(value_of(factor, numbers | {cost.PIECE: piece})) for factor in (formula.a, formula.b)]
        for piece in range(pieces)
    ]
    a, b = max(by_piece, key=sum)
    return a, b


def _numbers(site: Site, terms: Terms) -> dict[sympy.Symbol, int | sympy.Rational]:
    return {
        cost.T: terms.workload.tokens,
        cost.K: terms.workload.adapters,
        cost.D: site.in_features,
        cost.O: site.out_features,
        cost.C: terms.max_rank,
        cost.N: terms.mesh.size,
        cost.M: site_pieces(site, terms.mesh),
        cost.E: terms.element_size,
        cost.F: max(terms.element_size, 4),
    }


def _label(members: Sequence[Site]) -> str:
    first, *rest = (site.name for site in members)
    return "+".join([pattern_of(first), *(name.rpartition(".")[2] for name in rest)])
