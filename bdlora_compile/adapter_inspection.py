"""What an adapter would be on the ranks of a model, and all that is wrong with it at once; no base weights are read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bdlora_compile.errors import AdapterError, BdloraError
from bdlora_compile.factors import Layout, LocalShape, local_shape
from bdlora_compile.model_config import read_model_config
from bdlora_compile.placement import Mesh, site_pieces
from bdlora_compile.plan import ModelPlan, check_degree, plan_model
from bdlora_compile.roles import sites_of
from bdlora_compile.runtime.adapter_agreement import BaseName, check_pair, factor_names, pair_factors
from bdlora_compile.runtime.adapter_config import AdapterConfig, check_config, parse_config, read_config
from bdlora_compile.runtime.adapter_file import FactorKind, LoraFactors
from bdlora_compile.runtime.adapter_targets import SitePlan, plan_sites
from bdlora_compile.runtime.adapter_tensors import TensorSource, check_finite
from bdlora_compile.runtime.adapter_weights import find_weights
from bdlora_compile.runtime.bank import chunk_elements
from bdlora_compile.sites import Role, Site, in_module_order, vocabulary_sites


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """One site of an adapter.

    Attributes:
        site: the layer.
        kind: which factor is packed.
        rank, nblocks, scaling: R, G and what multiplies B A.
        layout: how the factors lie on the ranks.
        local_ranks: r of each rank.
        elements: what each rank holds, as it lies in the pool.
        reason: why it lies as it does.
    """

    site: Site
    kind: FactorKind
    rank: int
    nblocks: int
    scaling: float
    layout: Layout
    local_ranks: Sequence[int]
    elements: Sequence[int]
    reason: str


@dataclass(slots=True)
class Inspection:
    """What was found of an adapter; ``problems`` is empty if it can be served."""

    source: str
    sites: list[SiteFacts] = field(default_factory=list)
    problems: list[BdloraError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def elements(self) -> Sequence[int]:
        """What each rank holds of all sites."""
        return [sum(own) for own in zip(*(facts.elements for facts in self.sites), strict=True)]


def plan_for(model: str | Path, tp: int, layout: Layout) -> ModelPlan:
    """The plan of a model that is not loaded: its configuration is enough.

    Raises:
        PlacementError: ``tp`` does not divide the model.
    """
    config = read_model_config(model)
    dtype = config.dtype or torch.float32
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(config, dtype=dtype)
    sites = in_module_order(hollow, {**sites_of(hollow), **vocabulary_sites(hollow)})
    check_degree(hollow, sites, Mesh(tp))
    return plan_model(hollow, sites, Mesh(tp), dict.fromkeys(sites, layout), 1, dtype, torch.device("meta"))


def inspect_adapter(path: str | Path, plan: ModelPlan, base_model: str | None = None) -> Inspection:
    """Everything there is to say of the adapter at ``path`` on the ranks of ``plan``; raises nothing about it."""
    found = Inspection(str(path))
    config = _config(Path(path), found)
    tensors = _tensors(Path(path), found)
    if config is None or tensors is None:
        return found
    base = BaseName(config.base_model_name_or_path, base_model)
    try:
        plans, notes = plan_sites(config, plan.sites, found.source)
    except AdapterError as error:
        found.problems.append(error)
        return found
    found.notes += notes
    for name, (a, b) in _pairs(tensors, plans, plan.sites, base, found).items():
        _inspect_site(plan.sites[name], plans[name], a, b, base, plan, found)
    return found


def _config(folder: Path, found: Inspection) -> AdapterConfig | None:
    try:
        raw = read_config(folder / "adapter_config.json")
    except AdapterError as error:
        found.problems.append(error)
        return None
    config, problems = check_config(raw, found.source)
    found.problems += problems
    if not problems:
        found.notes += parse_config(raw, found.source)[1]
    return config


def _tensors(folder: Path, found: Inspection) -> Mapping[str, TensorSource] | None:
    try:
        return find_weights(folder).tensors()
    except AdapterError as error:
        found.problems.append(error)
        return None


def _pairs(
    tensors: Mapping[str, TensorSource],
    plans: Mapping[str, SitePlan],
    sites: Mapping[str, Site],
    base: BaseName,
    found: Inspection,
) -> Mapping[str, tuple[TensorSource, TensorSource]]:
    try:
        pairs, notes = pair_factors(tensors, plans, sites, found.source, base)
    except AdapterError as error:
        found.problems.append(error)
        # What can be paired all the same may have problems of its own.
        names = {name: factor_names(sites[name]) for name in plans}
        return {name: (tensors[a], tensors[b]) for name, (a, b) in names.items() if a in tensors and b in tensors}
    found.notes += notes
    return pairs


def _inspect_site(
    site: Site,
    own: SitePlan,
    a: TensorSource,
    b: TensorSource,
    base: BaseName,
    plan: ModelPlan,
    found: Inspection,
) -> None:
    try:
        check_pair(site, own, a, b, found.source, base)
    except AdapterError as error:
        found.problems.append(error)
        return
    for tensor in (a, b):
        try:
            check_finite(tensor)
        except AdapterError as error:
            found.problems.append(error)
    factors = LoraFactors(site.name, own.kind, own.rank, own.nblocks, own.scaling, a, b)
    layout = plan.layouts[site.name]
    shapes = [local_shape(factors, site, layout, rank, plan.mesh) for rank in range(plan.mesh.size)]
    found.sites.append(
        SiteFacts(
            site,
            own.kind,
            own.rank,
            own.nblocks,
            own.scaling,
            layout,
            [max(shape.a_rank, shape.b_rank) if layout is Layout.LOCAL else shape.a_rank for shape in shapes],
            [chunk_elements([shape]) for shape in shapes],
            _reason(factors, site, layout, plan.mesh, shapes),
        )
    )


def _reason(factors: LoraFactors, site: Site, layout: Layout, mesh: Mesh, shapes: Sequence[LocalShape]) -> str:
    """Why the factors of a site lie as they do."""
    column = site.role is Role.COLUMN
    if mesh.size == 1:
        return "one rank holds all"
    if layout is Layout.SLORA:
        return "S-LoRA: A cut by rank, A x gathered" if column else "S-LoRA: A cut by columns, A x summed"
    wanted = FactorKind.BLOCK_B if column else FactorKind.BLOCK_A
    whole = "A on every rank, B cut" if column else "A cut, B on every rank"
    if factors.kind is FactorKind.DENSE:
        return f"ordinary: {whole}"
    if factors.kind is not wanted:
        return f"blocks on the side that is not cut; as ordinary: {whole}"
    pieces = site_pieces(site, mesh)
    if factors.nblocks % pieces == 0:
        return f"lined up: {factors.nblocks // pieces} of {factors.nblocks} blocks a rank"
    if pieces % factors.nblocks == 0:
        return f"{pieces // factors.nblocks} ranks share a block: its other factor on each"
    return "blocks overlap ranks: each holds those that it needs"


def layer_pattern(name: str) -> str:
    """A site's name with its layer's number left out: sites that are alike have one."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)
