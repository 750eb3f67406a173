"""Which layout each group of LoRA sites gets: asked for, or chosen by the cost model (``strategy="auto"``).

Decided once per model, for all layers alike, from what all ranks know in the same way: the declared kinds and ranks of
the adapters, the expected load, the machine's constants. The sites of a group share a layout, or they could not be
merged into one call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from bdlora_compile.errors import ConfigError
from bdlora_compile.factors import Layout
from bdlora_compile.machine import Machine, find_machine
from bdlora_compile.runtime.adapter_file import Adapter
from bdlora_compile.runtime.agreement import Agreement, require_equal
from bdlora_compile.sites import Site
from bdlora_compile.timing import Declared, Profile, Seconds, SiteGroup, Terms, Workload, group_sites, lora_seconds

Strategy = Literal["local", "slora", "auto"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Why a group of sites has its layout.

    Attributes:
        group: its sites in every layer, for example ``model.layers.*.self_attn.q_proj+k_proj+v_proj``.
        layers: how many layers have it.
        chosen: the layout.
        local, slora: estimated LoRA time of the group in one layer with each layout; None without a cost model.
        why: the reason in words and numbers.
    """

    group: str
    layers: int
    chosen: Layout
    local: Seconds | None
    slora: Seconds | None
    why: str

    def text(self) -> str:
        """One line."""
        return f"{self.group}: {self.chosen.value}, {self.why}"


@dataclass(frozen=True, slots=True)
class Choice:
    """How layouts are chosen.

    Attributes:
        layout: for every site; None is by the cost model.
        workload: the load to choose for.
        machine: what it runs on, None for the device's default.
    """

    layout: Layout | None
    workload: Workload
    machine: Machine | str | Path | None

    @classmethod
    def parse(cls, strategy: str, workload: Workload | None, machine: Machine | str | Path | None) -> "Choice":
        """Check what the caller asked for.

        Raises:
            ConfigError: the strategy is unknown, or a load is given to one that does not choose.
        """
        known = get_args(Strategy)
        if strategy not in known:
            raise ConfigError(
                "strategy",
                found=repr(strategy),
                expected=f"one of {', '.join(map(repr, known))}",
                remedy="choose one of them",
            )
        if strategy != "auto" and workload is not None:
            raise ConfigError(
                "workload",
                found=f"one given with strategy={strategy!r}",
                expected="strategy='auto', which chooses for it",
                remedy="leave it out, or load with strategy='auto'",
            )
        return cls(None if strategy == "auto" else Layout(strategy), workload or Workload(), machine)

    def machine_for(self, device: torch.device) -> Machine:
        """What it runs on.

        Raises:
            ConfigError: there is no such machine.
        """
        return find_machine(self.machine, device)

    def layouts(
        self, sites: Mapping[str, Site], adapters: Sequence[Adapter], terms: Terms, agreement: Agreement
    ) -> tuple[dict[str, Layout], list[Decision]]:
        """The layout of each site and the reasons, the same on all ranks.

        Raises:
            AgreementError: a rank came to another choice.
        """
        if self.layout is not None:
            return fixed_layouts(sites, self.layout)
        layouts, decisions = choose_layouts(sites, [profile_of(adapter) for adapter in adapters], terms)
        text = "\n".join([repr(terms.machine), *(decision.text() for decision in decisions)])
        require_equal(agreement, "choice of layouts", text)
        return layouts, decisions


def profile_of(adapter: Adapter) -> Profile:
    """What an adapter declares."""
    return {name: Declared(factors.kind, factors.rank, factors.nblocks) for name, factors in adapter.factors.items()}


def fixed_layouts(sites: Mapping[str, Site], layout: Layout) -> tuple[dict[str, Layout], list[Decision]]:
    """One layout for every site, because it was asked for."""
    why = f"asked for (strategy={layout.value!r})"
    decisions = [Decision(group.label, len(group.layers), layout, None, None, why) for group in group_sites(sites)]
    return dict.fromkeys(sites, layout), decisions


def choose_layouts(
    sites: Mapping[str, Site], profiles: Sequence[Profile], terms: Terms
) -> tuple[dict[str, Layout], list[Decision]]:
    """The cheaper layout of each group by the cost model; local where both cost the same.

    A group at which every adapter is block-diagonal along the split dim is local without a comparison.

    Args:
        sites: all sites of the model.
        profiles: one for each adapter; without any, an ordinary adapter of rank ``max_rank`` on every site.
        terms: mesh, load and machine.
    """
    layouts: dict[str, Layout] = {}
    decisions = []
    for group in group_sites(sites):
        decision = _decide(group, profiles, terms)
        decisions.append(decision)
        layouts |= {site.name: decision.chosen for layer in group.layers for site in layer}
    return {name: layouts[name] for name in sites}, decisions


def _decide(group: SiteGroup, profiles: Sequence[Profile], terms: Terms) -> Decision:
    local, slora = (lora_seconds(group, layout, profiles, terms) for layout in (Layout.LOCAL, Layout.SLORA))
    load = f"{terms.workload.tokens} tokens, {terms.workload.adapters} adapters, {terms.machine.name}"
    if not profiles:
        load += f"; no adapter was given: ordinary ones of rank {terms.max_rank} are assumed"
    estimate = f"local {local.text()}, slora {slora.text()} a layer ({load})"
    if terms.mesh.size == 1:
        chosen, why = Layout.LOCAL, "one rank: nothing to communicate"
    elif _is_block_diagonal(group, profiles):
        chosen = Layout.LOCAL
        why = f"every adapter is block-diagonal here, and local needs no collective; {estimate}"
    else:
        chosen = Layout.SLORA if slora.total < local.total else Layout.LOCAL
        why = f"the cheaper one: {estimate}"
    return Decision(group.label, len(group.layers), chosen, local, slora, why)


def _is_block_diagonal(group: SiteGroup, profiles: Sequence[Profile]) -> bool:
    """Whether some adapter is at the group, and all that are have blocks along the split dim."""
    found = [
        profile[site.name].blocks_on_split_dim(site.role) > 1
        for profile in profiles
        for layer in group.layers
        for site in layer
        if site.name in profile
    ]
    return bool(found) and all(found)
