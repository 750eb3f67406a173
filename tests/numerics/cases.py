"""Random models, adapters, ranks and batches; what PEFT computes for them in float64, and what the compiled model does.

A case holds plain numbers and names only: its ``repr`` is Python that makes it again.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners import BdLoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

import bdlora_compile as bd
from bdlora_compile.strategy import Strategy
from tests.models import ALL_SITES, ATTENTION, COLUMN, ROW, relative_error

_FAMILIES: Mapping[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
_LENGTH = 6
"""Tokens of the longest prompt; Mistral's window is shorter."""


@dataclass(frozen=True)
class AdapterCase:
    """A LoRA adapter; ``nblocks`` 0 is an ordinary one, ``swapped`` has its blocks on the wrong side."""

    rank: int
    nblocks: int
    targets: tuple[str, ...]
    swapped: bool = False
    rslora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()

    def config(self) -> LoraConfig:
        """PEFT's configuration."""
        settings: dict[str, Any] = {}
        if self.nblocks:
            bd_a, bd_b = (COLUMN, ROW) if self.swapped else (ROW, COLUMN)
            settings["use_bdlora"] = BdLoraConfig(
                target_modules_bd_a=list(bd_a), target_modules_bd_b=[*bd_b, "lm_head"], nblocks=self.nblocks
            )
        return LoraConfig(
            r=self.rank,
            lora_alpha=6,
            use_rslora=self.rslora,
            rank_pattern=dict(self.ranks),
            target_modules=list(self.targets),
            **settings,
        )


@dataclass(frozen=True)
class Case:
    """A model, its adapters, the ranks that serve it, and a batch.

    Attributes:
        rows: for each row of the batch the number of its adapter, -1 for none.
        padding: for each row its padded tokens on the left.
        is_dynamic: batch and length are symbols in the graph, as they are by default. Passes then take twice as long:
            most cases have numbers.
    """

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    layers: int
    tied: bool
    ranks: int
    strategy: Strategy
    adapters: tuple[AdapterCase, ...]
    rows: tuple[int, ...]
    padding: tuple[int, ...]
    seed: int = 0
    is_dynamic: bool = False

    def config(self) -> PretrainedConfig:
        """transformers' configuration."""
        more: dict[str, Any] = {} if self.family == "qwen2" else {"head_dim": self.head_dim}
        if self.family == "mistral":
            more["sliding_window"] = _LENGTH - 2
        return _FAMILIES[self.family](
            hidden_size=self.heads * self.head_dim,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=64,
            **more,
        )

    def features(self, target: str) -> tuple[int, int]:
        """(D, O) of a site."""
        hidden, inner, kv = self.heads * self.head_dim, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (hidden, inner),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (inner, hidden),
            "gate_proj": (hidden, self.intermediate),
            "up_proj": (hidden, self.intermediate),
            "down_proj": (self.intermediate, hidden),
            "lm_head": (hidden, self.vocabulary),
        }[target]


@st.composite
def cases(draw: st.DrawFn, ranks: int, strategy: Strategy) -> Case:
    """Cases in which the ranks divide the model."""
    kv_heads = draw(st.sampled_from([heads for heads in range(1, 9) if heads % ranks == 0 or ranks % heads == 0]))
    groups = draw(st.sampled_from([count for count in range(1, 9) if kv_heads * count % ranks == 0][:2]))
    model = Case(
        family=draw(st.sampled_from(list(_FAMILIES))),
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 6, 8])),
        intermediate=ranks * draw(st.integers(2, 9)),
        vocabulary=draw(st.integers(11, 60)),
        layers=draw(st.sampled_from([1, 1, 1, 2])),
        tied=draw(st.booleans()),
        ranks=ranks,
        strategy=strategy,
        adapters=(),
        rows=(),
        padding=(),
        seed=draw(st.integers(0, 99)),
        is_dynamic=draw(st.sampled_from([False, False, False, True])),
    )
    adapters = tuple(draw(st.lists(adapter_cases(model), min_size=1, max_size=3)))
    # At least one row has an adapter: batches without any run another graph, which a fixed example covers.
    first = draw(st.integers(0, len(adapters) - 1))
    rows = (first, *draw(st.lists(st.integers(-1, len(adapters) - 1), max_size=3)))
    padding = tuple(draw(st.integers(0, _LENGTH - 2)) for _ in rows)
    return replace(model, adapters=adapters, rows=rows, padding=padding)


@st.composite
def adapter_cases(draw: st.DrawFn, model: Case) -> AdapterCase:
    """An adapter that PEFT can make for the model."""
    nblocks = draw(st.sampled_from([2, 4, 3, 8, 1, 0, 0]))
    swapped = nblocks > 0 and draw(st.sampled_from([False, False, False, True]))
    some = st.lists(st.sampled_from(ALL_SITES), min_size=1, max_size=4, unique=True).map(tuple)
    targets: tuple[str, ...] = draw(st.sampled_from([ALL_SITES, ATTENTION]) | some)
    if draw(st.sampled_from([False, False, False, True])):
        targets += draw(st.sampled_from([("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")]))
    if nblocks:
        targets = tuple(it for it in targets if it != "embed_tokens" and _fits(model, it, nblocks, swapped))
        if not targets:
            nblocks, swapped, targets = 0, False, ATTENTION
    width = max(nblocks, 1)
    rank = width * draw(st.integers(1, 4 if width < 4 else 2))
    own = ((draw(st.sampled_from(targets)), width * draw(st.integers(1, 3))),) if draw(st.booleans()) else ()
    return AdapterCase(rank, nblocks, targets, swapped, draw(st.booleans()), own)


def _fits(model: Case, target: str, nblocks: int, swapped: bool) -> bool:
    """Whether the blocks divide the side of a site that they lie on."""
    wide, tall = model.features(target)
    side = wide if (target in ROW) != (swapped and target != "lm_head") else tall
    return side % nblocks == 0


def error_of(case: Case) -> float:
    """Relative error of the compiled model's logits from PEFT's own, in float64 and with all ranks in one process."""
    torch.manual_seed(case.seed)
    peft = _peft_model(case)
    ids = torch.randint(3, case.vocabulary, (len(case.rows), _LENGTH))
    mask = (torch.arange(_LENGTH) >= torch.tensor(case.padding)[:, None]).long()
    rows = [None if number < 0 else f"a{number}" for number in case.rows]
    expected = _reference(peft, ids, mask, rows)
    torch._dynamo.reset()
    ranks = bd.Ranks.lockstep(case.ranks) if case.ranks > 1 else None
    model, adapters = bd.attach(peft, ranks=ranks, strategy=case.strategy)
    compiled: Any = model
    compiled.compile(backend="bdlora")
    with adapters.use(rows), torch.no_grad(), traced_with(case.is_dynamic):
        found = compiled(ids, attention_mask=mask, use_cache=False).logits
    keep = mask.bool()
    return relative_error(found[keep], expected[keep])


def traced_with(is_dynamic: bool) -> AbstractContextManager[object]:
    """Let Dynamo trace forwards with symbols (as it does by default) or with numbers for batch and length."""
    return nullcontext() if is_dynamic else mock.patch("torch._dynamo.maybe_mark_dynamic")


def _peft_model(case: Case) -> Any:
    """A random model with all adapters; weights are large enough that every part matters to the logits."""
    base = AutoModelForCausalLM.from_config(case.config(), attn_implementation="sdpa").double().eval()
    model: Any = get_peft_model(base, case.adapters[0].config(), adapter_name="a0", autocast_adapter_dtype=False)
    for number, adapter in enumerate(case.adapters[1:], start=1):
        model.add_adapter(f"a{number}", adapter.config(), autocast_adapter_dtype=False)
    for parameter in model.double().parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model


@torch.no_grad()
def _reference(model: Any, ids: Tensor, mask: Tensor, rows: Sequence[str | None]) -> Tensor:
    """PEFT's logits, one row at a time without its padding."""
    out = torch.zeros(*ids.shape, model.config.vocab_size, dtype=torch.float64)
    for row, name in enumerate(rows):
        keep = mask[row].bool()
        own = ids[row : row + 1, keep]
        if name is None:
            with model.disable_adapter():
                out[row, keep] = model(own, use_cache=False).logits[0]
        else:
            model.set_adapter(name)
            out[row, keep] = model(own, use_cache=False).logits[0]
    return out
