"""Whether the tensors of an adapter, its configuration and the sites of the model agree, and why they do not."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_fields import config_error, short, some
from bdlora_compile.runtime.adapter_targets import VOCABULARY_NAMES, FactorKind, SitePlan
from bdlora_compile.runtime.adapter_tensors import TensorSource
from bdlora_compile.sites import Site

_PREFIX: Final = "base_model.model."
_LINEAR_ENDS: Final = (".lora_A.weight", ".lora_B.weight")
_LOOKUP_ENDS: Final = (".lora_embedding_A", ".lora_embedding_B")
_TRAINING_ONLY: Final = ".lora_velora_embed"
"""A buffer of VeLoRA's backward pass, saved beside factors that are those of an ordinary LoRA."""

_REFUSED_TENSORS: Final = (
    (".lora_embedding_A.", "an adapter name inside", "take the names of PEFT's get_peft_model_state_dict"),
    (".lora_embedding_B.", "an adapter name inside", "take the names of PEFT's get_peft_model_state_dict"),
    (".lora_embedding_", "no factor of an embedding that PEFT saves", "save it with PEFT"),
    (".lora_magnitude_vector", "the magnitudes of DoRA", "merge it with PEFT's merge_and_unload"),
    (".lora_diag", "the diagonal of KaSA", "train again without kasa_config"),
    (".lora_monteclora_", "the sampler of MonteCLoRA", "train again without monteclora_config"),
    (".trainable_tokens_", "trained rows of the embedding", "merge it with PEFT's merge_and_unload"),
    (
        ".base_layer.",
        "whole weights of the base model, which PEFT saves by default where embed_tokens or lm_head is targeted",
        "if they were not trained, save it again with save_pretrained(..., save_embedding_layers=False)",
    ),
    (".lora_B.bias", "a bias of lora_bias", "merge it with PEFT's merge_and_unload"),
    (".lora_A.", "an adapter name inside", "take the names of PEFT's get_peft_model_state_dict"),
    (".lora_B.", "an adapter name inside", "take the names of PEFT's get_peft_model_state_dict"),
    (".bias", "a trained bias", "merge it with PEFT's merge_and_unload"),
    (
        ".weight",
        "whole weights of the base model (modules_to_save, or embeddings of a resized vocabulary)",
        "train LoRA alone, or if they were not trained save again with save_embedding_layers=False",
    ),
)
"""Parts of names, from the special to the general: what the tensor is, and what to do."""


@dataclass(frozen=True, slots=True)
class BaseName:
    """The base model that an adapter names, and the one that is served."""

    declared: str | None
    served: str | None

    @property
    def differs(self) -> bool:
        """Whether both are known and the last parts of their names differ; case and folders do not count."""
        return bool(self.declared and self.served) and _last_part(self.declared) != _last_part(self.served)

    def says(self) -> str:
        """What the adapter says it was trained on, for the end of a remedy."""
        if not self.declared:
            return "it does not say on which base model it was trained"
        trained = f"it says it was trained on {short(self.declared)}"
        return f"wrong base model: {trained}, and {short(self.served)} is served" if self.differs else trained

    def notes(self) -> list[str]:
        """What to say of an adapter of which all tensors fit."""
        return [f"{self.says().removeprefix('wrong base model: ')}; all shapes fit"] if self.differs else []


def _last_part(name: str | None) -> str:
    return (name or "").replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def pair_factors(
    tensors: Mapping[str, TensorSource],
    plans: Mapping[str, SitePlan],
    sites: Mapping[str, Site],
    source: str,
    base: BaseName,
) -> tuple[dict[str, tuple[TensorSource, TensorSource]], list[str]]:
    """A and B of each targeted site, in the order of ``sites``, and notes.

    Raises:
        AdapterError: a tensor is none of a LoRA factor's, a factor is missing, or one is there that no site takes.
    """
    idle = [name for name in tensors if name.endswith(_TRAINING_ONLY)]
    _refuse_other_tensors([name for name in tensors if name not in idle], source)
    present = {_site_name(name): name for name in tensors if name not in idle}
    extra = sorted(present.keys() - sites.keys())
    _refuse_vocabulary(extra, source)
    _refuse_extra(extra, sites, source, base)
    _refuse_other_kind([name for name in tensors if name not in idle], sites, source)
    _refuse_untargeted([name for name in sites if name in present and name not in plans], source)
    needed = {name: factor_names(sites[name]) for name in sites if name in plans}
    missing = [name for pair in zip(*needed.values(), strict=True) for name in pair if name not in tensors]
    _refuse_missing(missing, len(tensors), source, base)
    notes = [f"{len(idle)} tensors that VeLoRA uses while training are ignored"] if idle else []
    return {name: (tensors[a], tensors[b]) for name, (a, b) in needed.items()}, notes


def factor_names(site: Site) -> tuple[str, str]:
    """Names of A and B of a site, as PEFT saves them."""
    end_a, end_b = _LOOKUP_ENDS if site.is_lookup else _LINEAR_ENDS
    return f"{_PREFIX}{site.name}{end_a}", f"{_PREFIX}{site.name}{end_b}"


def _site_name(name: str) -> str:
    """The site of a factor: what is left of its name without prefix and end."""
    end = next(end for end in (*_LINEAR_ENDS, *_LOOKUP_ENDS) if name.endswith(end))
    return name.removeprefix(_PREFIX).removesuffix(end)


def _refuse_other_kind(names: list[str], sites: Mapping[str, Site], source: str) -> None:
    """Factors of an embedding at a linear layer, or the other way round."""
    found = [name for name in names if name not in factor_names(sites[_site_name(name)])]
    if found:
        raise AdapterError(
            f"{source}: {len(found)} tensors",
            found=some(map(short_name, found)),
            expected=f"{' and '.join(_LOOKUP_ENDS)} for an embedding, {' and '.join(_LINEAR_ENDS)} for a linear layer",
            remedy="save it with PEFT, from the model that it was trained on",
        )


def _refuse_vocabulary(names: list[str], source: str) -> None:
    """LoRA on the embedding or the logits of a model that was loaded without room for it."""
    found = [name for name in names if name.rpartition(".")[2] in VOCABULARY_NAMES]
    if found:
        raise AdapterError(
            f"{source}: tensors of {', '.join(found)}",
            found="LoRA on the vocabulary",
            expected="LoRA on the decoder's layers alone: the model was loaded without sites at its vocabulary",
            remedy="load the model with vocabulary_lora=True",
        )


def _refuse_other_tensors(names: Collection[str], source: str) -> None:
    bare = [name for name in names if not name.startswith(_PREFIX)]
    if bare:
        raise _tensor_error(bare, source, f"names that do not start with {_PREFIX!r}", "save it with PEFT")
    rest = [name for name in names if not name.endswith((*_LINEAR_ENDS, *_LOOKUP_ENDS))]
    for part, meaning, remedy in (*_REFUSED_TENSORS, ("", "no tensor that PEFT saves for LoRA", "save it with PEFT")):
        found = [name for name in rest if part in name]
        if found:
            raise _tensor_error(found, source, meaning, remedy)


def _tensor_error(names: Collection[str], source: str, meaning: str, remedy: str) -> AdapterError:
    return AdapterError(
        f"{source}: {len(names)} tensors",
        found=f"{some(map(short_name, names))} ({meaning})",
        expected=f"{_PREFIX}<module>{' and '.join(_LINEAR_ENDS)} alone",
        remedy=remedy,
    )


def short_name(name: str) -> str:
    """A name from a file: as it is when it is plain and of usual length, else its cut ``repr``."""
    return name if name.isprintable() and len(name) <= 160 else short(name)


def _refuse_extra(extra: list[str], sites: Mapping[str, Site], source: str, base: BaseName) -> None:
    if extra:
        raise AdapterError(
            f"{source}: tensors of {len(extra)} modules",
            found=f"LoRA for {some(map(short_name, extra))}",
            expected=f"LoRA for sites of the model only: {_describe(sites)}",
            remedy="serve it on the model it was trained on, or load that model with these among target_modules; "
            f"{base.says()}",
        )


def _describe(sites: Mapping[str, Site]) -> str:
    names = list(sites)
    if not names:
        return "it has none"
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return f"{len(names)} sites ({kinds}), from {names[0]} to {names[-1]}"


def _refuse_untargeted(names: list[str], source: str) -> None:
    if names:
        raise config_error(
            source,
            "target_modules",
            found=f"tensors for {some(names)}, which the fields that choose modules do not target",
            expected="the modules that have tensors",
            remedy="correct target_modules, exclude_modules and layers_to_transform, or save the adapter again",
        )


def _refuse_missing(missing: list[str], num_tensors: int, source: str, base: BaseName) -> None:
    if num_tensors == 0:
        raise AdapterError(
            f"{source}: tensors",
            found="none",
            expected="factors A and B of at least one site",
            remedy="save the adapter again: an adapter without tensors would serve the base model unchanged",
        )
    if missing:
        raise AdapterError(
            f"{source}: tensors of the targeted sites",
            found=f"{len(missing)} missing: {some(missing)}",
            expected=f"{' and '.join(_LINEAR_ENDS)} of every site that adapter_config targets",
            remedy=f"save the adapter again, or correct target_modules and layers_to_transform; {base.says()}",
        )


@dataclass(frozen=True, slots=True)
class _Demand:
    """The shape that a factor must have, and what tells apart the ways to miss it.

    Attributes:
        shape: the stored shape.
        dense: the shape of the same factor, not packed.
        rank_dim: the dim of the rank, 0 for A and 1 for B.
        other_fits: whether the other factor of the site has its shape.
    """

    shape: tuple[int, int]
    dense: tuple[int, int]
    rank_dim: int
    other_fits: bool


def check_pair(site: Site, plan: SitePlan, a: TensorSource, b: TensorSource, source: str, base: BaseName) -> None:
    """Check the shapes of both factors of a site.

    Raises:
        AdapterError: nblocks does not divide what it splits, or a shape is not the one that the configuration, its
            block kind and the site demand.
    """
    _check_divides(site, plan, source, base)
    want_a, want_b = plan.shapes(site)
    demands = (
        (a, _Demand(want_a, (plan.rank, site.in_features), 0, b.shape == want_b)),
        (b, _Demand(want_b, (site.out_features, plan.rank), 1, a.shape == want_a)),
    )
    for tensor, demand in demands:
        if tensor.shape != demand.shape:
            raise _shape_error(tensor, demand, plan, source, base)


def _check_divides(site: Site, plan: SitePlan, source: str, base: BaseName) -> None:
    features = {FactorKind.BLOCK_A: site.in_features, FactorKind.BLOCK_B: site.out_features}.get(plan.kind, 0)
    side = "in_features" if plan.kind is FactorKind.BLOCK_A else "out_features"
    if plan.rank % plan.nblocks or features % plan.nblocks:
        raise config_error(
            source,
            "use_bdlora.nblocks",
            found=f"{plan.nblocks} at {site.name}, of rank {plan.rank} and {side} {features}",
            expected=f"a divisor of the rank and of {side}",
            remedy=f"write the number of blocks that it was trained with; {base.says()}",
        )


def _shape_error(tensor: TensorSource, demand: _Demand, plan: SitePlan, source: str, base: BaseName) -> AdapterError:
    likeness, advice = _diagnose(tensor.shape, demand, plan)
    packed = f", packed in {plan.nblocks} blocks" if demand.shape != demand.dense else ""
    return AdapterError(
        f"{source}: tensor {tensor.name}",
        found=f"shape {list(tensor.shape)}, {likeness}",
        expected=f"shape {list(demand.shape)} (rank {plan.rank}{packed})",
        remedy=f"{advice}; {base.says()}",
    )


def _diagnose(got: tuple[int, ...], demand: _Demand, plan: SitePlan) -> tuple[str, str]:
    """What a wrong shape looks like, and what to do; the likeliest cause first."""
    if len(got) != 2 or 0 in got:
        gather = "gather the shards of DeepSpeed ZeRO-3 or FSDP before save_pretrained, and save it again"
        return "as of a shard that was not gathered", gather
    # A packed factor differs from a dense one in its columns alone. So does one of a base model of another width, but
    # then the other factor does not fit.
    height, width = demand.dense
    if demand.other_fits and got[0] == height and width % got[1] == 0:
        return _diagnose_blocks(width // got[1], plan)
    if got == demand.shape[::-1]:
        return "transposed", "store A as [rank, in] and B as [out, rank]"
    if got[1 - demand.rank_dim] == demand.shape[1 - demand.rank_dim]:
        return "of another rank", "correct r and rank_pattern in adapter_config.json to what it was trained with"
    return "of another width", "serve it on the model it was trained on"


def _diagnose_blocks(blocks: int, plan: SitePlan) -> tuple[str, str]:
    if blocks == 1:
        advice = "remove this module from use_bdlora, or pack the factor that is block-diagonal"
        return "not packed, as of an ordinary LoRA", advice
    found = f"nblocks={plan.nblocks}" if plan.nblocks > 1 else "no blocks for it"
    advice = f"name this module in use_bdlora with nblocks={blocks}, as it was trained (the file has {found})"
    return f"as packed in {blocks} blocks", advice
