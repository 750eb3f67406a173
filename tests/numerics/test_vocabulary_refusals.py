"""LoRA on the vocabulary: where it is offered, what is refused there, and the remedy where it is not offered."""

import pytest
import torch

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_file import adapter_from_tensors
from bdlora_compile.sites import Role, Site
from tests.numerics.test_adapter_refusals import CONFIG, PREFIX, Q0, SITES, TRAINED, Bad, check, label, name_of

EMBEDDING = f"{PREFIX}model.embed_tokens.lora_embedding_"
WITH_VOCABULARY = {
    "model.embed_tokens": Site("model.embed_tokens", Role.ROW, 50, 48, vocabulary=True),
    **SITES,
    "lm_head": Site("lm_head", Role.COLUMN, 48, 50, vocabulary=True, tied_weight="model.embed_tokens.weight"),
}
VOCABULARY_CONFIG = {**CONFIG, "target_modules": ["embed_tokens", "lm_head"]}
VOCABULARY_TENSORS = {
    f"{EMBEDDING}A": torch.ones(8, 50),
    f"{EMBEDDING}B": torch.ones(48, 8),
    name_of("lm_head", "A"): torch.ones(8, 48),
    name_of("lm_head", "B"): torch.ones(50, 8),
}
ASK_FOR_IT = "load the model with vocabulary_lora=True"


def test_vocabulary_is_served_where_it_is_offered() -> None:
    """The control of the next two tests."""
    adapter = adapter_from_tensors(VOCABULARY_CONFIG, VOCABULARY_TENSORS, WITH_VOCABULARY, source="good")
    assert list(adapter.factors) == ["model.embed_tokens", "lm_head"]


def test_tied_adapters_have_both_ends_of_a_tied_vocabulary() -> None:
    """ensure_weight_tying: PEFT saves factors of lm_head too, which target_modules does not name."""
    config = {**VOCABULARY_CONFIG, "target_modules": ["embed_tokens"]}
    tied = {**config, "ensure_weight_tying": True}
    assert len(adapter_from_tensors(tied, VOCABULARY_TENSORS, WITH_VOCABULARY, source="tied").factors) == 2
    with pytest.raises(AdapterError, match="tensors for lm_head, which the fields that choose modules do not target"):
        adapter_from_tensors(config, VOCABULARY_TENSORS, WITH_VOCABULARY, source="untied")


@pytest.mark.parametrize("site", ["model.embed_tokens", "lm_head"])
def test_vocabulary_is_refused_with_the_remedy_where_it_is_not_offered(site: str) -> None:
    tensors = {name: tensor for name, tensor in VOCABULARY_TENSORS.items() if f".{site}." in name}
    with pytest.raises(AdapterError) as info:
        adapter_from_tensors(VOCABULARY_CONFIG, tensors, SITES, source="bad")
    check(Bad(f"tensors of {site}", "LoRA on the vocabulary", "the decoder's layers alone", ASK_FOR_IT), info.value)


VOCABULARY_REFUSED = [
    Bad(
        f"tensor {EMBEDDING}A",
        "shape [50, 8], transposed",
        "shape [8, 50] (rank 8)",
        TRAINED,
        tensors={f"{EMBEDDING}A": torch.ones(50, 8)},
    ),
    Bad(
        f"tensor {EMBEDDING}B",
        "of another width",
        "shape [48, 8]",
        TRAINED,
        tensors={f"{EMBEDDING}B": torch.ones(40, 8)},
    ),
    Bad(
        "tensors of the targeted sites",
        f"1 missing: {EMBEDDING}B",
        "every site",
        TRAINED,
        tensors={f"{EMBEDDING}B": None},
    ),
    Bad(
        "1 tensors",
        name_of("model.embed_tokens", "A"),
        ".lora_embedding_A and .lora_embedding_B for an embedding",
        "save it with PEFT",
        tensors={name_of("model.embed_tokens", "A"): torch.ones(8, 50)},
    ),
    Bad(
        "1 tensors",
        f"{PREFIX}{Q0}.lora_embedding_A",
        ".lora_A.weight and .lora_B.weight for a linear layer",
        "save it with PEFT",
        tensors={f"{PREFIX}{Q0}.lora_embedding_A": torch.ones(8, 48)},
    ),
    Bad(
        "field 'use_bdlora'",
        "the embedding model.embed_tokens",
        "PEFT has no block-diagonal LoRA for embeddings",
        "ordinary LoRA for the embedding",
        {"use_bdlora": {"target_modules_bd_b": ["lm_head"], "nblocks": 2, "match_strict": False}},
    ),
    Bad(
        "field 'use_bdlora.nblocks'",
        "4 at lm_head, of rank 8 and out_features 50",
        "a divisor of the rank and of out_features",
        TRAINED,
        {"target_modules": ["lm_head"], "use_bdlora": {"target_modules_bd_b": ["lm_head"], "nblocks": 4}},
        {f"{EMBEDDING}A": None, f"{EMBEDDING}B": None},
    ),
    Bad(
        "1 tensors",
        "(whole weights",
        "alone",
        "save_embedding_layers=False",
        tensors={f"{PREFIX}lm_head.base_layer.weight": torch.ones(50, 48)},
    ),
]


@pytest.mark.parametrize("bad", VOCABULARY_REFUSED, ids=label)
def test_vocabulary_refused(bad: Bad) -> None:
    tensors = {name: it for name, it in {**VOCABULARY_TENSORS, **bad.tensors}.items() if it is not None}
    with pytest.raises(AdapterError) as info:
        adapter_from_tensors({**VOCABULARY_CONFIG, **bad.config}, tensors, WITH_VOCABULARY, source="bad")
    check(bad, info.value)
