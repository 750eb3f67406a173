"""Estimated time of a whole forward on one rank, from the formulas of `cost.py` and the constants of a machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from bdlora_compile import cost
from bdlora_compile.factors import Layout
from bdlora_compile.placement import Mesh
from bdlora_compile.sites import Site
from bdlora_compile.timing import (
    Numbers,
    Profile,
    Seconds,
    Terms,
    Workload,
    base_seconds,
    formula_seconds,
    group_sites,
    lora_seconds,
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a forward's time depends on beside the sites.

    Attributes:
        hidden: features of the residual stream.
        vocabulary: V.
        layers: decoder layers.
        heads, kv_heads: of attention, in all.
        head_dim: size of a head.
    """

    hidden: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelShape":
        """Read from a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            config.hidden_size,
            config.vocab_size,
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


@dataclass(frozen=True, slots=True)
class Phase:
    """A kind of forward.

    Attributes:
        name: "prefill" or "decode".
        batch: rows.
        seq: tokens that the forward adds to each row.
        context: tokens that a token attends to, on average.
    """

    name: str
    batch: int
    seq: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens of the forward."""
        return self.batch * self.seq


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated time of one forward on the fullest rank, by what it is spent on.

    Attributes:
        phase: "prefill" or "decode".
        strategy: the layouts that it is for.
        layouts: of each group of sites.
        projections: linear layers of all decoder layers, their all-reduces with them.
        lora: LoRA of all layers.
        attention: of all layers.
        outside: embedding and logits.
    """

    phase: str
    strategy: str
    layouts: Mapping[str, Layout]
    projections: Seconds
    lora: Seconds
    attention: Seconds
    outside: Seconds

    @property
    def total(self) -> float:
        """Seconds of the forward."""
        return self.projections.total + self.lora.total + self.attention.total + self.outside.total


def phases(batch: int, prompt_length: int) -> tuple[Phase, Phase]:
    """The forward of a batch of prompts, and the one of a token more for each row."""
    return (
        Phase("prefill", batch, prompt_length, max(prompt_length // 2, 1)),
        Phase("decode", batch, 1, prompt_length),
    )


def estimate(
    shape: ModelShape,
    sites: Mapping[str, Site],
    profiles: Sequence[Profile],
    strategy: str,
    layouts: Mapping[str, Layout],
    terms: Terms,
    phase: Phase,
) -> Estimate:
    """Add up one forward; ``layouts`` are those of the groups, by label."""
    adapters = min(terms.workload.adapters, phase.batch)
    own = replace(terms, workload=Workload(phase.tokens, adapters))
    projections = lora = Seconds()
    for group in group_sites(sites):
        count = len(group.layers)
        projections += base_seconds(group, own).times(count)
        lora += lora_seconds(group, layouts[group.label], profiles, own).times(count)
    return Estimate(
        phase.name,
        strategy,
        layouts,
        projections,
        lora,
        _attention(shape, own, phase).times(shape.layers),
        _outside(shape, own, phase),
    )


def _attention(shape: ModelShape, terms: Terms, phase: Phase) -> Seconds:
    return formula_seconds([(cost.attention(), attention_numbers(shape, terms, phase))], terms)


def attention_numbers(shape: ModelShape, terms: Terms, phase: Phase) -> Numbers:
    """Numbers of the formula of one layer's attention."""
    return {
        cost.E: terms.element_size,
        cost.T: phase.tokens,
        cost.ROWS: phase.batch,
        cost.CONTEXT: phase.context,
        cost.HEADS: _share(shape.heads, terms.mesh),
        cost.H_KV: _share(shape.kv_heads, terms.mesh),
        cost.HEAD_DIM: shape.head_dim,
    }


def _outside(shape: ModelShape, terms: Terms, phase: Phase) -> Seconds:
    numbers = outside_numbers(shape, terms, phase)
    return formula_seconds([(cost.embedding(), numbers)], terms) + formula_seconds([(cost.logits(), numbers)], terms)


def outside_numbers(shape: ModelShape, terms: Terms, phase: Phase) -> Numbers:
    """Numbers of the formulas of the embedding and the logits."""
    return {
        cost.E: terms.element_size,
        cost.T: phase.tokens,
        cost.ROWS: phase.batch,
        cost.D: shape.hidden,
        cost.V: shape.vocabulary,
        cost.N: terms.mesh.size,
    }


def _share(heads: int, mesh: Mesh) -> int:
    """Heads that a rank holds; one is held by several where there are fewer than ranks."""
    return max(heads // mesh.size, 1)
