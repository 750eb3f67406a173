"""From a model and what was asked for to its deployment: sites, plan, banks and the set of adapters."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from bdlora_compile.errors import ConfigError, PlacementError
from bdlora_compile.hollow import hollow_out
from bdlora_compile.ir import layer_of
from bdlora_compile.placement import Mesh
from bdlora_compile.plan import ModelPlan, check_degree, plan_model
from bdlora_compile.ranks import Ranks
from bdlora_compile.roles import sites_of
from bdlora_compile.runtime.adapter_capacity import Capacity
from bdlora_compile.runtime.adapter_file import Adapter
from bdlora_compile.runtime.adapter_targets import ALL_LINEAR, names_or_ends
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.runtime.agreement import Agreement, StoreAgreement
from bdlora_compile.runtime.all_reduce import AllReduce, Wanted
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.cache import CacheShape
from bdlora_compile.runtime.copier import copier_for
from bdlora_compile.runtime.deployment import Deployment, RankState
from bdlora_compile.runtime.step_watch import StepWatch
from bdlora_compile.runtime.store import ShardStore, WeightSource
from bdlora_compile.served import serve
from bdlora_compile.sites import Site, in_module_order, unsplit_layers, vocabulary_sites
from bdlora_compile.stand_ins import StandIns
from bdlora_compile.strategy import Choice
from bdlora_compile.timing import Terms, group_sites


@dataclass(frozen=True, slots=True)
class Setup:
    ranks: Ranks
    choice: Choice
    dtype: torch.dtype
    device: torch.device
    strict: bool
    capacity: Capacity
    base_model: str | None
    all_reduce: Wanted


def deploy(
    model: PreTrainedModel,
    layers: Mapping[str, Site],
    sites: Mapping[str, Site],
    source: WeightSource,
    found: Mapping[str, Adapter],
    setup: Setup,
) -> AdapterSet:
    ranks, capacity = setup.ranks, setup.capacity
    machine = setup.choice.machine_for(setup.device)
    transport = AllReduce.choose(setup.all_reduce, ranks.mesh, machine, setup.dtype, setup.device, ranks.agreement)
    terms = Terms(
        ranks.mesh,
        setup.choice.workload,
        machine if transport.buffer is not None else machine.without_symmetric_memory(),
        capacity.max_rank,
        setup.dtype.itemsize,
    )
    layouts, decisions = setup.choice.layouts(sites, list(found.values()), terms, ranks.agreement)
    plan = plan_model(
        model, sites, ranks.mesh, layouts, capacity.max_rank, setup.dtype, setup.device, decisions,
        max_local_rank=capacity.max_local_rank, layers=layers,
    )  # fmt: skip
    slots, pool = capacity.pool(plan)
    states = [_rank_state(plan, source, rank, slots, pool, capacity.max_tokens, transport) for rank in ranks.hosted]
    watch = _watch_of(ranks.agreement, setup.device)
    deployment = Deployment(plan, states, ranks.agreement, setup.strict, watch=watch)
    hollow_out(model, deployment)
    deployment.stand_ins = stand_ins_of(model, layers)
    serve(model, deployment, cache_shape(model, plan, len(ranks.hosted)))
    model.requires_grad_(False)
    model.eval()
    adapters = AdapterSet(deployment, slots, setup.base_model, capacity.host_bytes)
    for name, adapter in found.items():
        adapters.add(name, adapter)
    return adapters


def stand_ins_of(model: PreTrainedModel, linears: Iterable[str]) -> StandIns | None:
    """For the list of layers that the linear layers are in; None if they are in none, or in several."""
    paths = {layer.rpartition(".")[0] for site in linears if (layer := layer_of(site)) is not None}
    path = paths.pop() if len(paths) == 1 else ""
    layers = model.get_submodule(path)
    return StandIns(path, layers) if isinstance(layers, nn.ModuleList) else None


def served_sites(model: PreTrainedModel, mesh: Mesh, strict: bool) -> dict[str, Site]:
    """The linear layers that ranks share; in strict mode all of the decoder's."""
    sites = sites_of(model)
    whole = unsplit_layers(model, sites)
    if not whole or mesh.size == 1 or not strict:
        check_degree(model, sites, mesh)
        return sites
    raise PlacementError(
        whole[0] + (f" and {len(whole) - 1} more" if len(whole) > 1 else ""),
        found="a linear layer that the model's tensor-parallel plan does not split by columns or rows",
        expected="a plan for every linear layer of the decoder (strict mode)",
        remedy="load with strict=False, and every rank holds these layers whole; they take no adapters",
    )


def offered_sites(
    model: PreTrainedModel,
    layers: Mapping[str, Site],
    vocabulary_lora: bool | None,
    target_modules: str | Collection[str] | None = None,
) -> Mapping[str, Site]:
    """The sites that the adapters given at load may change, in module order.

    Raises:
        ConfigError: ``target_modules`` names what is no linear layer of the decoder.
    """
    if isinstance(target_modules, str):
        target_modules = None if target_modules.lower() == ALL_LINEAR else [target_modules]
    chosen = layers if target_modules is None else _targeted(layers, target_modules)
    if vocabulary_lora is False:
        return chosen
    return in_module_order(model, {**chosen, **vocabulary_sites(model)})


def _targeted(layers: Mapping[str, Site], target_modules: Collection[str]) -> dict[str, Site]:
    """Layers of these names, and those that read one input with them: they are one product, with one call for LoRA."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    unknown = [end for end in sorted(target_modules) if not any(map(names_or_ends([end]), layers))]
    if unknown or not target_modules:
        raise ConfigError(
            "target_modules",
            found=", ".join(map(repr, unknown)) or "no name",
            expected=f"names of linear layers, or their ends: {', '.join(ends)}; or {ALL_LINEAR!r}",
            remedy="name the layers that adapters may change",
        )
    is_wanted = names_or_ends(target_modules)
    together = [sites for group in group_sites(layers) for sites in group.layers]
    chosen = {site.name for sites in together if any(is_wanted(site.name) for site in sites) for site in sites}
    return {name: site for name, site in layers.items() if name in chosen}


def needed_sites(
    offered: Mapping[str, Site], changed: Iterable[Collection[str]], vocabulary_lora: bool | None
) -> Mapping[str, Site]:
    """Sites of the vocabulary cost every slot of the pool: they are there if asked for, or if an adapter needs them.

    ``changed``: for each adapter the names of its sites.
    """
    is_needed = any(offered[name].vocabulary for names in changed for name in names)
    if vocabulary_lora or is_needed:
        return offered
    return {name: site for name, site in offered.items() if not site.vocabulary}


def _rank_state(
    plan: ModelPlan,
    source: WeightSource,
    rank: int,
    slots: int,
    pool: int,
    max_tokens: int,
    transport: AllReduce,
) -> RankState:
    store = ShardStore(source, rank, plan.mesh, plan.dtype, plan.device)
    bank = AdapterBank(list(plan.sites), slots, pool, max_tokens, plan.dtype, plan.device, copier_for(plan.device))
    return RankState(rank, store, bank, transport)


def _watch_of(agreement: Agreement, device: torch.device) -> StepWatch | None:
    """On GPUs a collective is only launched: one that never ends raises nothing."""
    if device.type != "cuda" or not isinstance(agreement, StoreAgreement):
        return None
    return StepWatch(*agreement.forward_limits, agreement.give_up)


def cache_shape(model: PreTrainedModel, plan: ModelPlan, num_hosted: int) -> CacheShape:
    """What a cache of the model must look like on one rank."""
    config = model.config
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    local_heads = max(heads // plan.mesh.size, 1)
    return CacheShape(config.num_hidden_layers, local_heads, head_dim, plan.dtype, plan.device, num_hosted)
