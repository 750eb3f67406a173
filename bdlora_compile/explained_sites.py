"""What a rank holds of each LoRA site, and how much that is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from bdlora_compile.explanation import ExplainedSite
from bdlora_compile.factors import Layout, LocalShape, local_shape
from bdlora_compile.placement import Mesh, site_pieces
from bdlora_compile.placement import local_shape as shard_shape
from bdlora_compile.plan import ModelPlan
from bdlora_compile.runtime.adapter_file import LoraFactors
from bdlora_compile.runtime.adapter_tensors import MemoryTensor
from bdlora_compile.sites import Role, Site
from bdlora_compile.timing import Declared, Profile, declared_elements, group_sites, pattern_of


def explain_sites(plan: ModelPlan, profiles: Sequence[Profile]) -> list[ExplainedSite]:
    """A line for each site of a layer, in module order."""
    return [
        _explain_site([layer[position] for layer in group.layers], plan, profiles)
        for group in group_sites(plan.sites)
        for position in range(len(group.sites))
    ]


def _explain_site(alike: Sequence[Site], plan: ModelPlan, profiles: Sequence[Profile]) -> ExplainedSite:
    site, mesh = alike[0], plan.mesh
    layout = plan.layouts[site.name]
    pieces = site_pieces(site, mesh)
    weight = (site.out_features, site.in_features)
    dim = 0 if site.role is Role.COLUMN else 1
    local = tuple(-(-size // pieces) if axis == dim else size for axis, size in enumerate(weight))
    declared = [profile[one.name] for profile in profiles for one in alike if one.name in profile]
    elements = sum(sum(declared_elements(site, one, layout, mesh)) for one in declared)
    shape = _fullest(site, declared[0], layout, mesh) if declared else None
    return ExplainedSite(
        pattern_of(site.name),
        len(alike),
        site.role.value,
        weight,
        (local[0], local[1]),
        mesh.size // pieces,
        layout,
        sorted({one.rank for one in declared}),
        (shape.a_rank, shape.in_features // shape.a_blocks) if shape else (0, 0),
        (shape.out_features // shape.b_blocks, shape.b_rank) if shape else (0, 0),
        local[0] * local[1] * plan.dtype.itemsize,
        elements * plan.dtype.itemsize // max(len(profiles) * len(alike), 1),
        0 if site.is_lookup else 2 * local[0] * local[1],
    )


def _fullest(site: Site, declared: Declared, layout: Layout, mesh: Mesh) -> LocalShape:
    """Shapes on the rank that holds most."""
    nothing = MemoryTensor("shapes only", torch.empty(0, 0), "shapes only")
    factors = LoraFactors(site.name, declared.kind, declared.rank, declared.nblocks, 1.0, nothing, nothing)
    shapes = [local_shape(factors, site, layout, rank, mesh) for rank in range(mesh.size)]
    return max(shapes, key=lambda shape: shape.a_numel + shape.b_numel)


def weight_bytes(model: PreTrainedModel, plan: ModelPlan) -> int:
    """Bytes of the weights that a rank holds; a tied one counts once."""
    shapes = {name: shard_shape(tuple(one.shape), plan.placement_of(name)) for name, one in model.named_parameters()}
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * plan.dtype.itemsize


def adapter_bytes(plan: ModelPlan, profiles: Sequence[Profile]) -> int:
    """Bytes of one adapter on the rank that holds most, a mean of the adapters."""
    elements = Counter(
        (replace(site, name="", tied_weight=None), plan.layouts[name], profile[name])
        for profile in profiles
        for name, site in plan.sites.items()
        if name in profile
    )
    total = sum(
        count * sum(declared_elements(site, declared, layout, plan.mesh))
        for (site, layout, declared), count in elements.items()
    )
    return total * plan.dtype.itemsize // len(profiles)
