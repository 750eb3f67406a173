"""The estimated decode step as one expression in the load and the machine's constants.

The sum is that of `estimate.estimate`, over the same formulas of `cost.py`; only the load and the machine stay symbols,
so that a reader can change them:

    T tokens (rows that decode), K distinct adapters among them, L tokens of each context,
    W_mem bytes/s of memory, F_peak FLOP/s, t_launch seconds of a kernel, t_ar and t_ag latencies of all-reduce and
    all-gather, W_ar and W_ag wire bytes/s of their links, t_one, t_two, W_one and W_two those of all-reduces through
    symmetric memory, one-shot and two-shot

`tests/api/test_inspector.py` holds it against `estimate.estimate` in Python; the browser's test does so in JavaScript.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import sympy
from sympy import Expr

from bdlora_compile import cost
from bdlora_compile.collective_cost import ways
from bdlora_compile.cost import Formula
from bdlora_compile.estimate import ModelShape, attention_numbers, outside_numbers, phases
from bdlora_compile.explanation import StepFormula
from bdlora_compile.factors import Layout
from bdlora_compile.machine import LinkKind
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.sites import Site
from bdlora_compile.timing import (
    Numbers,
    Profile,
    SiteGroup,
    Terms,
    base_members,
    exchange_ways,
    group_sites,
    lora_members,
)

W_MEM, F_PEAK, T_LAUNCH = (sympy.Symbol(name, positive=True) for name in ("W_mem", "F_peak", "t_launch"))


def _link(name: str) -> tuple[sympy.Symbol, sympy.Symbol]:
    return sympy.Symbol(f"t_{name}", positive=True), sympy.Symbol(f"W_{name}", positive=True)


LINKS: Mapping[LinkKind, tuple[sympy.Symbol, sympy.Symbol]] = {
    "all_reduce": _link("ar"),
    "all_gather_into_tensor": _link("ag"),
    "one_shot": _link("one"),
    "two_shot": _link("two"),
}
"""Latency and bandwidth of each kind of link."""
_FREE = frozenset({cost.T, cost.K, cost.ROWS, cost.CONTEXT})
"""What of a formula's symbols is left to the reader."""


def step_formulas(
    shape: ModelShape,
    sites: Mapping[str, Site],
    profiles: Sequence[Profile],
    layouts: Mapping[str, Mapping[str, Layout]],
    terms: Terms,
) -> list[StepFormula]:
    """One expression for each strategy; ``layouts`` are those of the groups, by strategy and label."""
    groups = group_sites(sites)
    shared = _shared(shape, groups, terms)
    return [_told(name, shared + _lora(groups, profiles, chosen, terms)) for name, chosen in layouts.items()]


NAMES = frozenset(
    str(symbol) for symbol in (cost.T, cost.K, cost.CONTEXT, W_MEM, F_PEAK, T_LAUNCH, *chain(*LINKS.values()))
)
"""All names that `constants` may give, and the expressions may hold."""


def constants(terms: Terms, batch: int, context: int) -> dict[str, float]:
    """Values of the expressions' symbols for the explained load and machine."""
    machine, ranks = terms.machine, terms.mesh.size
    found = {
        "T": float(batch),
        "K": float(min(terms.workload.adapters, batch)),
        "L": float(context),
        "W_mem": machine.memory_bandwidth,
        "F_peak": machine.flops,
        "t_launch": machine.launch,
    }
    if ranks > 1:
        sums = ways(machine, "all_reduce", ranks, is_sum=True)
        for way in [*sums, *ways(machine, "all_gather_into_tensor", ranks, is_sum=False)]:
            latency, bandwidth = LINKS[way.kind]
            found |= {str(latency): way.link.latency, str(bandwidth): way.link.bandwidth}
    return found


def _shared(shape: ModelShape, groups: Sequence[SiteGroup], terms: Terms) -> Expr:
    """What is the same with every strategy: linear layers, attention, embedding and logits."""
    _, decode = phases(terms.workload.tokens, 1)
    parts = [
        len(group.layers) * _seconds(members, terms) for group in groups if (members := base_members(group, terms))
    ]
    parts.append(shape.layers * _seconds([(cost.attention(), attention_numbers(shape, terms, decode))], terms))
    outside = outside_numbers(shape, terms, decode)
    parts += [_seconds([(formula, outside)], terms) for formula in (cost.embedding(), cost.logits())]
    return sympy.Add(*parts)


def _lora(
    groups: Sequence[SiteGroup], profiles: Sequence[Profile], layouts: Mapping[str, Layout], terms: Terms
) -> Expr:
    parts = []
    for group in groups:
        members = lora_members(group, layouts[group.label], profiles, terms)
        product = base_members(group, terms)
        parts.append(len(group.layers) * _seconds(members, terms, beside=product))
    return sympy.Add(*parts)


def _seconds(
    members: Sequence[tuple[Formula, Numbers]], terms: Terms, beside: Sequence[tuple[Formula, Numbers]] = ()
) -> Expr:
    """As `timing.lora_seconds`, with the load and the machine as symbols; ``beside`` is LoRA's product."""
    return _kernels(members) + _exchange(members, terms, _kernels(beside) if beside else sympy.Integer(0))


def _kernels(members: Sequence[tuple[Formula, Numbers]]) -> Expr:
    first, own = members[0]
    moved = _part(first.x_reads, own) + sympy.Add(*(_part(one.reads + one.writes, its) for one, its in members))
    flops = sympy.Add(*(_part(one.flops, its) for one, its in members))
    return sympy.Max(moved / W_MEM, flops / F_PEAK) + _part(first.launches, own) * T_LAUNCH


def _exchange(members: Sequence[tuple[Formula, Numbers]], terms: Terms, product: Expr) -> Expr:
    """What is seen of a group's collective: of few tokens, through symmetric memory, what outlasts its product."""
    choices = exchange_ways(members, terms)
    if not choices:
        return sympy.Integer(0)
    payload = sympy.Add(*(_part(one.exchange.payload, its) for one, its in members if one.exchange))
    pieces = []
    for way in choices:
        latency, bandwidth = LINKS[way.kind]
        seconds = latency + way.sent * payload / bandwidth
        if way.is_symmetric:
            few = (sympy.Max(0, seconds - product), cost.T <= BY_TOKEN_LIMIT)
            seconds = sympy.Piecewise(few, (seconds, True))
        pieces.append((seconds, True if way.largest is None else payload <= way.largest))
    return sympy.Piecewise(*pieces)


def _part(formula: Expr, numbers: Numbers) -> Expr:
    # Rows are tokens in a decode step.
    fixed = {symbol: sympy.sympify(number) for symbol, number in numbers.items() if symbol not in _FREE}
    return formula.xreplace(fixed).xreplace({cost.ROWS: cost.T})


def _told(strategy: str, seconds: Expr) -> StepFormula:
    return StepFormula(strategy, str(seconds), sympy.jscode(seconds))
