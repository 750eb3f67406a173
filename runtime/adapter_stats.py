"""What the tiers of adapters hold and how they did, and how many adapters of a kind a budget holds."""

from dataclasses import dataclass

import torch

from bdlora_compile.errors import ConfigError
from bdlora_compile.factors import local_shape
from bdlora_compile.plan import ModelPlan
from bdlora_compile.runtime.adapter_file import FactorKind, LoraFactors
from bdlora_compile.runtime.adapter_tensors import MemoryTensor
from bdlora_compile.runtime.bank import chunk_elements
from bdlora_compile.sites import Role, Site


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """A snapshot; counts are since the model was loaded, bytes are of one rank (the fullest).

    Attributes:
        known: names that can be used.
        resident: adapters in the device's pool, former contents that rows still use among them.
        in_use: resident ones with an open `use` block.
        pinned: resident ones that are pinned.
        in_host_memory: adapters with a copy in host memory.
        slots: adapters that can be resident at once.
        pool_bytes, pool_used_bytes: the device's pool.
        host_bytes, host_used_bytes: the budget for copies in host memory, and what they take.
        hits, misses: adapters that a `use` found resident, and those that it had to bring in.
        evictions: adapters that left the pool for others.
        compactions: times that chunks were moved because free room was in pieces.
        disk_reads: adapters that were read again since their copy in host memory had been given up.
        stall_seconds: time that `use` spent bringing adapters in.
        block_diagonal_fit, ordinary_fit: adapters of rank ``max_rank`` on all sites that the pool's bytes hold: with
            one block for each rank, and without blocks. None where blocks do not divide the model or the rank, 0 where
            ``max_local_rank`` admits no ordinary ones. At an embedding only ordinary adapters have factors: PEFT has no
            blocks there.
    """

    known: int
    resident: int
    in_use: int
    pinned: int
    in_host_memory: int
    slots: int
    pool_bytes: int
    pool_used_bytes: int
    host_bytes: int
    host_used_bytes: int
    hits: int
    misses: int
    evictions: int
    compactions: int
    disk_reads: int
    stall_seconds: float
    block_diagonal_fit: int | None
    ordinary_fit: int


def adapter_elements(plan: ModelPlan, max_rank: int, nblocks: int = 1) -> int:
    """Elements of the pool that an adapter of rank ``max_rank`` on all sites takes, on the fullest rank.

    Args:
        plan: the model's sites, layouts and mesh.
        max_rank: R.
        nblocks: G; 1 is an ordinary adapter, the largest that any kind of this rank can be.

    Raises:
        ConfigError: G does not divide the rank or a site.
    """
    targeted = [site for site in plan.sites.values() if nblocks == 1 or not site.is_lookup]
    kinds = [(site, _factors(site, max_rank, nblocks)) for site in targeted]

    def elements(rank: int) -> int:
        shapes = [local_shape(kind, site, plan.layouts[site.name], rank, plan.mesh) for site, kind in kinds]
        return chunk_elements(shapes)

    return max(elements(rank) for rank in range(plan.mesh.size))


def adapters_that_fit(plan: ModelPlan, elements: int, max_rank: int, nblocks: int = 1) -> int | None:
    """Adapters of a kind (see `adapter_elements`) that a pool holds; None where G divides the rank or a site not."""
    try:
        size = adapter_elements(plan, max_rank, nblocks)
    except ConfigError:
        return None
    return elements // size if size else 0


def _factors(site: Site, rank: int, nblocks: int) -> LoraFactors:
    kind, features = FactorKind.DENSE, nblocks
    if nblocks > 1:
        is_column = site.role is Role.COLUMN
        kind = FactorKind.BLOCK_B if is_column else FactorKind.BLOCK_A
        features = site.out_features if is_column else site.in_features
    if rank % nblocks or features % nblocks:
        raise ConfigError(
            site.name,
            found=f"rank {rank} and {features} features",
            expected=f"numbers that {nblocks} blocks divide",
            remedy="choose another number of blocks",
        )
    nothing = MemoryTensor("sizing", torch.empty(0, 0), "sizing")
    return LoraFactors(site.name, kind, rank, nblocks, 1.0, nothing, nothing)
