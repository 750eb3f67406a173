"""Collectives of a step by a machine's table, where one rank runs alone."""

from typing import Any

import bdlora_compile as bd
from bdlora_compile.census import number_of
from bdlora_compile.ir import Origin
from bdlora_compile.machine import Machine


def priced(model: Any, batch: int, machine: Machine, *, with_lora: bool) -> float:
    """Milliseconds of the collectives in a decode step of ``batch`` rows: latency plus bytes over bandwidth, each."""
    census = bd.reports(model)[-1].stages[-1].census
    seconds = 0.0
    for one in census.collectives:
        if one.origin is Origin.LORA and not with_lora:
            continue
        link = machine.link("all_reduce" if one.kind == "all_reduce" else "all_gather_into_tensor", one.group_size)
        seconds += one.runs * link.seconds(number_of(one.wire_bytes, batch, 1))
    return seconds * 1e3
