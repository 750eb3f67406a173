"""Run the compiler's front half on a model that has no weights, and tell what it did.

The model is built on the meta device and hollowed out; Dynamo traces a prefill and a decode forward with the cache that
`generate` would make; the passes run as they do when serving; nothing is read, bound, emitted or communicated.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bdlora_compile import attention
from bdlora_compile.backend import analyse
from bdlora_compile.deploying import cache_shape, needed_sites, offered_sites, served_sites, stand_ins_of
from bdlora_compile.errors import ConfigError
from bdlora_compile.estimate import Estimate, ModelShape, estimate, phases
from bdlora_compile.explained_graph import explain_graph
from bdlora_compile.explained_sites import adapter_bytes, explain_sites, weight_bytes
from bdlora_compile.explanation import ExplainedEstimate, Explanation
from bdlora_compile.factors import Layout
from bdlora_compile.foreign.explaining import Inputs, explain_sharded, is_of_others
from bdlora_compile.hollow import hollow_out, materialize_buffers
from bdlora_compile.known_models import known_config
from bdlora_compile.machine import Machine, find_machine
from bdlora_compile.model_config import read_model_config
from bdlora_compile.placement import Mesh
from bdlora_compile.plan import ModelPlan, plan_model
from bdlora_compile.printer import dtype_text
from bdlora_compile.report import Report
from bdlora_compile.runtime.adapter_file import read_adapter
from bdlora_compile.runtime.agreement import Alone
from bdlora_compile.runtime.cache import LocalCache
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.served import serve
from bdlora_compile.sites import Role, Site
from bdlora_compile.step_formula import constants, step_formulas
from bdlora_compile.strategy import Strategy, choose_layouts, fixed_layouts, profile_of
from bdlora_compile.timing import Declared, Profile, Terms, Workload
from bdlora_compile.tracing import own_errors, with_own_code

_CPU = torch.device("cpu")
_TRACED_BATCH, _TRACED_LENGTH = 2, 64
"""Sizes of the traced forwards: they are symbols in the graphs, and a small cache takes no memory."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load that an explanation's numbers are for.

    Attributes:
        batch: rows.
        prompt_length: tokens of each prompt, and of each context while decoding.
        adapters: distinct adapters among the rows; by default one for each row.
    """

    batch: int = 16
    prompt_length: int = 1024
    adapters: int | None = None

    def workload(self) -> Workload:
        """Of one decode step."""
        return Workload(self.batch, self.batch if self.adapters is None else self.adapters)


def explain(
    model: str | Path | PretrainedConfig | PreTrainedModel | Callable[..., Any],
    inputs: Inputs | None = None,
    *,
    tp_size: int,
    adapters: Mapping[str, str | Path] | None = None,
    adapter_rank: int | None = None,
    nblocks: int = 1,
    strategy: Strategy = "local",
    machine: Machine | str | Path | None = None,
    load: Load | None = None,
    target_modules: str | Collection[str] | None = None,
    strict: bool = True,
) -> Explanation:
    """Tell what the compiler does to a model on ``tp_size`` ranks; no weights, no GPU, no process group.

    Args:
        model: a known name (`known_models.known_models`), a ``config.json``, a model folder, a transformers
            configuration, or a model, of which the configuration is taken. With ``inputs`` also a module or a function
            that its owner sharded (see `foreign.explaining`): the record tells which of its collectives for LoRA go,
            and why the others stay; the arguments below are not for such a model.
        inputs: of a sharded model, the arguments of one forward: a tensor, a sequence, or a mapping by name. Of another
            model token ids [B, S], whose sizes are taken for ``load``.
        adapters: PEFT folders by name; only their headers are read.
        tp_size: N, the number of ranks.
        adapter_rank: without ``adapters``: R of an adapter on every site; 16 by default.
        nblocks: its blocks, along the dim that ranks split; 1 is an ordinary adapter.
        strategy: as for `load`.
        machine: whose constants the estimates take, as for `load`; "h100-nvlink" by default.
        load: rows, prompt length and distinct adapters that numbers are for.
        target_modules: linear layers that adapters may change, as for `load`; all by default.
        strict: as for `load`.

    Raises:
        ConfigError: an argument cannot be honoured.
        PlacementError: the number of ranks does not divide the model, or a value cannot stay on its rank.
        AdapterError: an adapter cannot be served.
    """
    if not isinstance(model, (str, Path, PretrainedConfig)) and is_of_others(model):
        others = (adapters, adapter_rank, machine, load, target_modules)
        is_plain = not any(others) and (nblocks, strategy) == (1, "local")
        return _explain_sharded(model, inputs, tp_size, is_plain)
    start = time.perf_counter()
    load = load or _load_of(inputs)
    config, name = _config_of(model)
    hollow = _meta_model(config)
    mesh = Mesh(tp_size, "explain")
    layers = served_sites(hollow, mesh, strict)
    offered = offered_sites(hollow, layers, vocabulary_lora=None, target_modules=target_modules)
    profiles, lines = _adapters(offered, adapters, adapter_rank, nblocks)
    # The sites of the vocabulary are there if an adapter needs them, as for `load`.
    sites = needed_sites(offered, profiles, vocabulary_lora=None)
    max_rank = max(declared.rank for profile in profiles for declared in profile.values())
    known = find_machine(machine)
    terms = Terms(mesh, load.workload(), known, max_rank, hollow.dtype.itemsize)
    chosen = {
        "local": fixed_layouts(sites, Layout.LOCAL),
        "slora": fixed_layouts(sites, Layout.SLORA),
        "auto": choose_layouts(sites, profiles, terms),
    }
    if strategy not in chosen:
        raise ConfigError(
            "strategy", found=repr(strategy), expected="'local', 'slora' or 'auto'", remedy="choose one of them"
        )
    layouts, decisions = chosen[strategy]
    groups = {name: {one.group: one.chosen for one in reasons} for name, (_, reasons) in chosen.items()}
    plan = plan_model(hollow, sites, mesh, layouts, max_rank, hollow.dtype, _CPU, decisions, layers=layers)
    held = weight_bytes(hollow, plan)
    both = phases(load.batch, load.prompt_length)
    shape = ModelShape.of(config)
    return Explanation(
        name=name,
        model=type(hollow).__name__,
        tp_size=tp_size,
        num_layers=shape.layers,
        dtype=dtype_text(hollow.dtype),
        strategy=strategy,
        adapters=lines,
        max_rank=max_rank,
        batch=load.batch,
        prompt_length=load.prompt_length,
        workload=terms.workload,
        machine=known,
        is_extrapolated=not known.is_measured(tp_size),
        weight_bytes=held,
        adapter_bytes=adapter_bytes(plan, profiles),
        decisions=decisions,
        sites=explain_sites(plan, profiles),
        estimates=[
            _explain_estimate(estimate(shape, sites, profiles, label, by_group, terms, phase))
            for phase in both
            for label, by_group in groups.items()
        ],
        graphs=[explain_graph(report, phase) for report, phase in zip(_trace(hollow, plan, strict), both, strict=True)],
        formulas=step_formulas(shape, sites, profiles, groups, terms),
        constants=constants(terms, load.batch, load.prompt_length),
        seconds=time.perf_counter() - start,
    )


def _explain_sharded(model: Callable[..., Any], inputs: Inputs | None, tp_size: int, is_plain: bool) -> Explanation:
    if inputs is None or not is_plain:
        raise ConfigError(
            "explain of a model that its owner sharded",
            found="no inputs" if inputs is None else "arguments for a model that bdlora shards",
            expected="explain(model, inputs, tp_size=...)",
            remedy="give the arguments of one forward, and nothing else",
        )
    return explain_sharded(model, inputs, tp_size)


def _load_of(inputs: Inputs | None) -> Load:
    """The sizes of token ids [B, S]."""
    if inputs is None:
        return Load()
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise ConfigError(
            "inputs", found=type(ids).__name__, expected="token ids [B, S]", remedy="give them, or load=Load(B, S)"
        )
    return Load(*ids.shape)


# --- what is explained ------------------------------------------------------------------------------------------------


def _config_of(model: str | Path | PretrainedConfig | Callable[..., Any]) -> tuple[PretrainedConfig, str]:
    """The configuration and what to call it."""
    if isinstance(model, PreTrainedModel):
        return model.config, type(model).__name__
    if isinstance(model, PretrainedConfig):
        return model, type(model).__name__
    assert isinstance(model, (str, Path)), "others were explained before"
    path = Path(model)
    if path.is_dir() or path.is_file():
        return read_model_config(path), str(model)
    return known_config(str(model)), str(model)


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    attention.register()
    with torch.device("meta"):
        dtype = config.dtype or torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    materialize_buffers(model, _CPU)
    return model.eval()


def _adapters(
    offered: Mapping[str, Site],
    adapters: Mapping[str, str | Path] | None,
    rank: int | None,
    nblocks: int,
) -> tuple[list[Profile], list[str]]:
    """What the adapters declare, and a line of text for each."""
    if adapters and (rank is not None or nblocks != 1):
        raise ConfigError(
            "adapter_rank, nblocks",
            found="both an adapter that is made up and adapters from folders",
            expected="one of them",
            remedy="leave out adapter_rank and nblocks, or adapters",
        )
    if adapters:
        found = {name: read_adapter(path, offered) for name, path in adapters.items()}
        lines = [f"{name}: {_profile_text(profile_of(adapter))}" for name, adapter in found.items()]
        return [profile_of(adapter) for adapter in found.values()], lines
    rank = 16 if rank is None else rank
    if rank < 1 or nblocks < 1 or rank % nblocks:
        raise ConfigError(
            "adapter_rank, nblocks",
            found=f"rank {rank} and {nblocks} blocks",
            expected="a rank that the number of blocks divides",
            remedy="choose a multiple of the number of blocks",
        )
    profile = {name: _made_up(site, rank, nblocks) for name, site in offered.items() if not site.vocabulary}
    return [profile], [f"made up: {_profile_text(profile)}"]


def _made_up(site: Site, rank: int, nblocks: int) -> Declared:
    """An adapter's site with blocks along the dim that ranks split."""
    split = site.out_features if site.role is Role.COLUMN else site.in_features
    if split % nblocks:
        raise ConfigError(
            f"nblocks={nblocks}",
            found=f"{split} features on the split dim of {site.name}",
            expected="a number of blocks that divides them",
            remedy="choose another nblocks",
        )
    return Declared.along_split_dim(site.role, rank, nblocks)


def _profile_text(profile: Profile) -> str:
    counts = Counter((declared.rank, declared.nblocks) for declared in profile.values())
    kinds = [
        f"rank {rank}, {f'{blocks} blocks' if blocks > 1 else 'ordinary'}, on {count} sites"
        for (rank, blocks), count in counts.items()
    ]
    return "; ".join(kinds)


# --- graphs -----------------------------------------------------------------------------------------------------------


def _trace(model: PreTrainedModel, plan: ModelPlan, strict: bool) -> list[Report]:
    """Reports of a prefill and a decode forward; the model is hollow afterwards."""
    deployment = Deployment(plan, [], Alone(), strict)
    shape = cache_shape(model, plan, num_hosted=1)
    hollow_out(model, deployment, is_guarded=False)
    deployment.stand_ins = stand_ins_of(model, plan.sites)
    serve(model, deployment, shape)
    model.requires_grad_(False)

    def look(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
        analyse(module, deployment, has_views=True)
        (results,) = module.graph.output_node().args
        count = len(results)  # type: ignore[arg-type]  # a graph of Dynamo returns a tuple
        # Nobody reads what the forward returns: the graph was what we wanted.
        return lambda *args: tuple(torch.empty(()) for _ in range(count))

    compiled = torch.compile(_forward_of(model), backend=look, fullgraph=True)
    cache = LocalCache(shape, _TRACED_BATCH, _TRACED_LENGTH)
    for seq in (4, 1):
        ids = torch.ones(_TRACED_BATCH, seq, dtype=torch.int64)
        torch._dynamo.maybe_mark_dynamic(ids, [0, 1])

        def forward(ids: torch.Tensor = ids) -> object:
            with own_errors(), torch.no_grad():
                return compiled(ids, cache)

        forward() if deployment.stand_ins is None else deployment.stand_ins.run(forward)
    return deployment.reports


def _forward_of(model: PreTrainedModel) -> Callable[[torch.Tensor, LocalCache], object]:
    """The model's forward as a function with code of its own."""

    def forward(ids: torch.Tensor, cache: LocalCache) -> object:
        # As a served model is called: its cache remembers the padding.
        return model(ids, attention_mask=cache.starts, past_key_values=cache, logits_to_keep=1)

    return with_own_code(forward)


def _explain_estimate(one: Estimate) -> ExplainedEstimate:
    parts = (one.projections, one.lora, one.attention, one.outside)
    return ExplainedEstimate(one.phase, one.strategy, one.layouts, *parts, seconds=one.total)
