"""Collectives of a step by a machine's table, where one rank runs alone."""

import re
from collections.abc import Sequence

from bdlora_compile.census import Census, Collective, number_of
from bdlora_compile.collective_cost import way_of, ways
from bdlora_compile.ir import Origin
from bdlora_compile.machine import CollectiveKind, Machine
from bdlora_compile.report import Report


def step_census(reports: Sequence[Report], batch: int, *, with_lora: bool) -> Census:
    """The collectives of the last graph that a decode step of ``batch`` rows runs through, with LoRA or without.

    Sizes that a graph was made for are numbers in it: one of a single row does not tell what more rows send.

    Raises:
        LookupError: no such step has run.
    """
    own = re.compile(rf"i64\[({batch}|s\d+), 1\]")
    found = [report for report in reports if own.fullmatch(report.inputs[0])]
    exact = [report for report in found if report.inputs[0] == f"i64[{batch}, 1]"]
    if not found:
        raise LookupError(f"no graph is a step of {batch} rows; there are {[report.inputs[0] for report in reports]}")
    report = (exact or found)[-1]
    return (report.stages if with_lora or not report.base_only else report.base_only)[-1].census


def priced(census: Census, batch: int, machine: Machine) -> float:
    """Milliseconds of the collectives in a decode step of ``batch`` rows: latency plus bytes over bandwidth, each.

    One after the other: that those of LoRA run beside products is not taken off.
    """
    return 1e3 * sum(one.runs * _seconds(one, batch, machine) for one in census.collectives)


def _seconds(one: Collective, batch: int, machine: Machine) -> float:
    kind: CollectiveKind = "all_reduce" if one.kind == "all_reduce" else "all_gather_into_tensor"
    payload = number_of(one.payload_bytes, batch, 1)
    choices = ways(machine, kind, one.group_size, is_sum=kind == "all_reduce" or one.origin is Origin.LORA)
    way = way_of(choices, payload)
    return way.link.latency + way.wire_seconds(payload)
