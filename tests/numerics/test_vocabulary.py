"""LoRA on the embedding and on the logits, against PEFT in float64: every rank holds its piece of the vocabulary."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import BdLoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import bdlora_compile as bd
from bdlora_compile import factors
from bdlora_compile.ir import Origin
from bdlora_compile.passes import lora_placement
from bdlora_compile.runtime.lockstep import LockStepProgram
from bdlora_compile.strategy import Strategy
from tests.models import (
    ALL_SITES,
    VOCABULARY,
    AdapterSpec,
    ModelSpec,
    Reference,
    relative_error,
    save_adapter,
    save_model,
)
from tests.numerics.cases import traced_with

TOLERANCE = 2e-6
"""As in test_compiled: norms and rotary angles are float32 in transformers' own code; 3e-7 is measured."""

HEAD_BLOCKS = {
    "use_bdlora": BdLoraConfig(target_modules_bd_b=["lm_head", "q_proj"], nblocks=4),
}
SPECS = {
    "both": AdapterSpec(rank=5, targets=VOCABULARY),
    "embedding": AdapterSpec(rank=3, targets=("embed_tokens",), options={"use_rslora": True}),
    "head": AdapterSpec(rank=4, targets=("lm_head", "v_proj"), options={"rank_pattern": {"lm_head": 6}}),
    "all": AdapterSpec(rank=4, targets=(*ALL_SITES, *VOCABULARY), options={"alpha_pattern": {"embed_tokens": 5}}),
    "layers": AdapterSpec(rank=4, nblocks=2),
}

Written = tuple[Path, dict[str, Path]]
Write = Callable[[ModelSpec, Mapping[str, AdapterSpec]], Written]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model and adapters."""

    def files(spec: ModelSpec, specs: Mapping[str, AdapterSpec]) -> Written:
        model = save_model(spec, tmp_path / "model")
        return model, {
            name: save_adapter(adapter, model, tmp_path / name, seed)
            for seed, (name, adapter) in enumerate(specs.items())
        }

    return files


def compiled(model: Path, paths: Mapping[str, Path], degree: int, strategy: Strategy, **more: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    ranks = bd.Ranks.lockstep(degree) if degree > 1 else None
    loaded, adapters = bd.load(model, paths, dtype=torch.float64, ranks=ranks, strategy=strategy, **more)
    loaded.compile(backend="bdlora")
    return loaded, adapters


@pytest.mark.parametrize(
    ("is_tied", "degree", "strategy"),
    # Each pair of values occurs; one rank has no layouts.
    [
        (True, 1, "local"),
        (False, 1, "local"),
        (True, 2, "slora"),
        (False, 2, "local"),
        (True, 4, "local"),
        (False, 4, "slora"),
    ],
)
def test_prefill_and_decode_equal_peft(write: Write, is_tied: bool, degree: int, strategy: Strategy) -> None:
    """One padded batch with adapters that touch the vocabulary, that do not, and none; 131 ids do not divide."""
    model, paths = write(ModelSpec(layers=2 if degree == 2 else 1, vocabulary=131, tied=is_tied), SPECS)
    loaded, adapters = compiled(model, paths, degree, strategy)
    rows = [*paths, None]
    torch.manual_seed(1)
    ids = torch.randint(3, 131, (len(rows), 6))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[-1, :2] = 0
    reference = Reference(model, paths, torch.float64)
    # The prompt's forward makes the logits of the last token alone: it takes the slots of those tokens, not of all.
    with adapters.use(rows), torch.no_grad():
        found = loaded.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    whole = torch.cat([mask, torch.ones(len(rows), 3, dtype=mask.dtype)], dim=1)
    expected = reference.logits(found.sequences, rows, whole)[:, ids.shape[1] - 1 : -1]
    assert relative_error(torch.stack(found.logits, dim=1), expected) < TOLERANCE
    for report in bd.reports(loaded):
        census = report.stages[-1].census
        assert report.base_only[-1].census.total(Origin.LORA) == 0
        if degree > 1:
            # Outside the layers: an all-reduce of h at the embedding, an all-gather at the logits.
            outside = {key[1:]: count for key, count in census.counts.items() if key[0] == "outside layers"}
            lora = {("lora", "all_reduce"): 1, ("lora", "all_gather_into_tensor"): 1} if strategy == "slora" else {}
            base = {("base", "all_reduce"): 1, ("base", "all_gather_into_tensor"): 1}
            assert outside == base | lora


@pytest.mark.parametrize("kept", [0, 2, [2, 0, 3, 1], [3, 1]], ids=str)
def test_tokens_whose_logits_are_asked_for(write: Write, kept: int | list[int]) -> None:
    """All, the last ones, all in another order, some: each with the adapter that was chosen for that very token.

    Adapters of lm_head alone leave hidden states as they are, so that a token's logits are those of its own adapter.
    """
    heads = {"first": AdapterSpec(rank=4, targets=("lm_head",)), "second": AdapterSpec(rank=2, targets=("lm_head",))}
    model, paths = write(ModelSpec(layers=1, vocabulary=131), heads)
    loaded, adapters = compiled(model, paths, 2, "local")
    ids = torch.randint(3, 131, (2, 4))
    names = [["first", None, "second", "second"], [None, "second", "first", None]]
    # With numbers for sizes all tokens in another order have the shape of all tokens.
    with adapters.use(names), torch.no_grad(), traced_with(is_dynamic=isinstance(kept, int)):
        found = loaded(ids, logits_to_keep=torch.tensor(kept) if isinstance(kept, list) else kept).logits
    reference = Reference(model, paths, torch.float64)
    alone = {name: reference.logits(ids, [name, name]) for name in (*paths, None)}
    rows = [torch.stack([alone[name][row, at] for at, name in enumerate(own)]) for row, own in enumerate(names)]
    positions = kept if isinstance(kept, list) else list(range(4))[-kept:]
    assert relative_error(found, torch.stack(rows)[:, positions]) < TOLERANCE


@pytest.mark.parametrize("kept", [[0], [3, 1, 0, 2]], ids=str)
def test_kept_tokens_that_look_like_all(write: Write, kept: list[int]) -> None:
    """Their slots are made where they are read, so nothing can be grouped before the layers."""
    model, paths = write(ModelSpec(layers=2, vocabulary=131), {"both": SPECS["both"]})
    loaded, adapters = compiled(model, paths, 2, "local")
    ids, rows = torch.randint(3, 131, (2, len(kept))), ["both", None]
    with adapters.use(rows), torch.no_grad(), traced_with(is_dynamic=False):
        found = loaded(ids, logits_to_keep=torch.tensor(kept)).logits
    assert relative_error(found, Reference(model, paths, torch.float64).logits(ids, rows)[:, kept]) < TOLERANCE


class Slots(TorchDispatchMode):
    """Keeps the slots of tokens that LoRA's operators are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        if func.namespace == "bdlora" and "token_slot" in names:
            self.seen.append(args[names.index("token_slot")])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", ["local", "slora"])
def test_slots_of_kept_tokens_lie_together(write: Write, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `generate` keeps the last one of each row; GPUs' kernels take it for granted, and refuse others."""
    model, paths = write(ModelSpec(layers=1, vocabulary=131), {"both": SPECS["both"]})
    loaded, adapters = compiled(model, paths, 2, strategy)
    slots, run = Slots(), LockStepProgram.__call__

    def watched(self: LockStepProgram, *args: Any) -> Any:
        with slots:
            return run(self, *args)

    monkeypatch.setattr(LockStepProgram, "__call__", watched)
    with adapters.use(["both", None]), torch.no_grad():
        loaded(torch.randint(3, 131, (2, 5)), logits_to_keep=1)
    assert {tuple(seen.shape) for seen in slots.seen} >= {(2,)}, "those of the logits are among them"
    assert all(seen.is_contiguous() for seen in slots.seen)


def test_inductor_in_one_process(write: Write) -> None:
    """The operators go through the CPU Inductor."""
    model, paths = write(ModelSpec(layers=1, vocabulary=131), {"both": SPECS["both"]})
    torch._dynamo.reset()
    loaded, adapters = bd.load(model, paths, dtype=torch.float64)
    loaded.compile(backend="bdlora", options={"inner": "inductor"})
    torch.manual_seed(1)
    ids, rows = torch.randint(3, 131, (2, 5)), ["both", None]
    with adapters.use(rows), torch.no_grad():
        found = loaded(ids, use_cache=False, logits_to_keep=2).logits
    expected = Reference(model, paths, torch.float64).logits(ids, rows)[:, -2:]
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("strategy", ["local", "slora"])
def test_blocks_at_the_logits(write: Write, strategy: Strategy) -> None:
    """Packed B [V, r/G]: G = 4 blocks on 2 ranks (two each), on 4 (one each), and on 3, where neither divides."""
    adapter = AdapterSpec(rank=8, targets=("lm_head", "q_proj"), options=HEAD_BLOCKS)
    model, paths = write(ModelSpec(heads=12, kv_heads=12, layers=1, vocabulary=132), {"blocks": adapter})
    ids = torch.randint(3, 131, (2, 5))
    expected = Reference(model, paths, torch.float64).logits(ids, ["blocks", None])
    for degree in (2, 4, 3):
        loaded, adapters = compiled(model, paths, degree, strategy)
        with adapters.use(["blocks", None]), torch.no_grad():
            assert relative_error(loaded(ids).logits, expected) < TOLERANCE


def test_a_rank_holds_its_share(write: Write) -> None:
    """A of the embedding and B of the logits are cut, packed blocks of the logits wholly; 128 ids divide."""
    specs = {
        "blocks": AdapterSpec(rank=8, targets=("lm_head", "q_proj"), options=HEAD_BLOCKS),
        "plain": AdapterSpec(rank=8, targets=VOCABULARY),
    }
    model, paths = write(ModelSpec(kv_heads=8, layers=1, vocabulary=128), specs)
    held: dict[tuple[str, int], int] = {}
    for degree in (1, 2, 4):
        for name, path in paths.items():
            loaded, _ = compiled(model, {name: path}, degree, "local", vocabulary_lora=True)
            (held[name, degree],) = {rank.bank.used_elements() for rank in loaded.bdlora.ranks}
    vocabulary, hidden, rank = 128, 64, 8
    for degree in (1, 2, 4):
        assert held["blocks", degree] == held["blocks", 1] // degree
        # Two factors cut, two replicated by choice: B of the embedding, A of the logits.
        assert held["plain", degree] == 2 * rank * (vocabulary // degree + hidden)


def test_sites_of_the_vocabulary_are_there_where_asked_for(write: Write) -> None:
    """Nothing is there for adapters of layers alone; a later adapter that needs it is told how to get it."""
    model, paths = write(ModelSpec(layers=1), {"layers": SPECS["layers"], "both": SPECS["both"]})
    layers = {"layers": paths["layers"]}
    plain, adapters = compiled(model, layers, 2, "local", max_rank=5)
    assert "lm_head" not in plain.bdlora.plan.sites
    with pytest.raises(bd.AdapterError, match=r"LoRA on the vocabulary.*load the model with vocabulary_lora=True"):
        adapters.load("both", paths["both"])
    assert adapters.names == ("layers",)
    with pytest.raises(bd.AdapterError, match="vocabulary_lora=True"):
        compiled(model, paths, 2, "local", vocabulary_lora=False)
    asked, adapters = compiled(model, layers, 2, "local", vocabulary_lora=True, max_rank=5)
    assert next(iter(asked.bdlora.plan.sites)) == "model.embed_tokens"
    assert list(asked.bdlora.plan.sites)[-1] == "lm_head"
    elements = [found.bdlora.ranks[0].bank.pool.numel() for found in (plain, asked)]
    assert elements[0] < elements[1]
    adapters.load("both", paths["both"])
    ids = torch.randint(3, 120, (2, 5))
    with adapters.use(["both", "layers"]), torch.no_grad():
        found = asked(ids).logits
    expected = Reference(model, paths, torch.float64).logits(ids, ["both", "layers"])
    assert relative_error(found, expected) < TOLERANCE
    with torch.no_grad():
        plain(ids)
    assert "lora_lookup" not in bd.reports(plain)[-1].stages[-1].text


@pytest.mark.parametrize("degree", [1, 2])
def test_peft_model_with_tied_adapters(write: Write, degree: int) -> None:
    """ensure_weight_tying: PEFT gives lm_head the embedding's factors, transposed; taken over from memory."""
    model, _ = write(ModelSpec(layers=1, vocabulary=131), {})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    torch.manual_seed(0)
    peft: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64), config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    peft.double().eval()
    ids = torch.randint(3, 131, (2, 5))
    with torch.no_grad():
        expected = peft(ids).logits
        with peft.disable_adapter():
            base = peft(ids).logits
    torch._dynamo.reset()
    loaded, adapters = bd.attach(peft, ranks=bd.Ranks.lockstep(degree) if degree > 1 else None)
    assert "lm_head" in loaded.bdlora.plan.sites
    loaded.compile(backend="bdlora")
    with adapters.use(["default", None]), torch.no_grad():
        found = loaded(ids).logits
    assert relative_error(found, torch.stack([expected[0], base[1]])) < TOLERANCE


@pytest.mark.parametrize("shift", ["ids", "tokens"])
def test_sabotage_is_noticed(write: Write, monkeypatch: pytest.MonkeyPatch, shift: str) -> None:
    """Ids that read the next column of A; logits of each row's last token with the slots of the first tokens."""
    model, paths = write(ModelSpec(layers=1), {"both": SPECS["both"], "head": SPECS["head"]})
    ids = torch.randint(3, 120, (2, 4))
    rows = ["both", "head"]
    expected = Reference(model, paths, torch.float64).logits(ids, rows)[:, -1]

    def error() -> float:
        loaded, adapters = compiled(model, paths, 2, "local")
        with adapters.use(rows), torch.no_grad():
            return relative_error(loaded(ids, logits_to_keep=1).logits[:, -1], expected)

    assert error() < TOLERANCE
    if shift == "ids":
        read = factors.read_local

        def shifted(found: Any, site: Any, layout: Any, rank: int, mesh: Any) -> Any:
            local = read(found, site, layout, rank, mesh)
            return replace(local, a=local.a.roll(1, 0)) if site.is_lookup else local

        monkeypatch.setattr("bdlora_compile.runtime.staging.read_local", shifted)
    else:
        monkeypatch.setattr(lora_placement.LoraPlacement, "_kept_tokens", lambda work, x, token_slot, site: token_slot)
    assert error() > 1e-2
