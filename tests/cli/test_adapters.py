"""`bdlora adapters inspect`, `convert` and `merge` against PEFT, dense SVD and what a rank really holds."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import bdlora_compile as bd
from bdlora_compile import adapter_conversion, adapter_merging
from bdlora_compile.cli import app
from tests.models import COLUMN, VOCABULARY, AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

runner = CliRunner()
IDS = torch.tensor([[5, 9, 33, 71]])

SPECS = {
    "dense": AdapterSpec(rank=4),
    "blocks": AdapterSpec(rank=8, nblocks=4),
    "swapped": AdapterSpec(rank=8, nblocks=4, swapped=True),
    "some": AdapterSpec(rank=4, targets=("q_proj", "down_proj"), options={"layers_to_transform": [1]}),
    "stable": AdapterSpec(rank=4, options={"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, and an adapter of each kind."""
    folder = tmp_path_factory.mktemp("tools")
    model = save_model(ModelSpec(), folder / "model")
    for seed, (name, spec) in enumerate(SPECS.items()):
        save_adapter(spec, model, folder / name, seed)
    return folder


def run(*arguments: object) -> tuple[int, str]:
    """Exit status, and all that was printed, in one line."""
    result = runner.invoke(app, ["adapters", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


# --- inspect --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["local", "slora"])
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("name", SPECS)
def test_inspect_tells_what_a_rank_really_holds(folder: Path, name: str, tp: int, strategy: Any) -> None:
    status, said = run("inspect", folder / name, "--model", folder / "model", "--tp", tp, "--strategy", strategy)
    assert status == 0, said
    assert "no problems" in said
    model, _ = bd.load(folder / "model", {"x": folder / name}, strategy=strategy, ranks=bd.Ranks.lockstep(tp))
    held = [rank.bank.used_elements() * 4 for rank in model.bdlora.ranks]
    total = re.search(r"(\d+) sites, ([\d,]+)(?: to ([\d,]+))? bytes on a rank, ([\d,]+) on all", said)
    assert total is not None, said
    low, high, all_ranks = (int((total[group] or total[2]).replace(",", "")) for group in (2, 3, 4))
    assert (low, high, all_ranks) == (min(held), max(held), sum(held))


@pytest.mark.parametrize(
    ("name", "tp", "why"),
    [
        ("dense", 2, "ordinary: A on every rank, B cut"),
        ("blocks", 2, "lined up: 2 of 4 blocks a rank"),
        ("blocks", 8, "2 ranks share a block"),
        ("swapped", 2, "blocks on the side that is not cut"),
        ("dense", 1, "one rank holds all"),
    ],
)
def test_inspect_says_why(folder: Path, name: str, tp: int, why: str) -> None:
    assert why in run("inspect", folder / name, "--model", folder / "model", "--tp", tp)[1]


def test_inspect_shows_all_problems_at_once(folder: Path, tmp_path: Path) -> None:
    """Two of the configuration, one of the names, one of a shape and one of a value."""
    bad = shutil.copytree(folder / "dense", tmp_path / "bad")
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "lora_bias": True}))
    tensors = load_file(bad / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0."
    tensors[start + "self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 60)
    tensors[start + "self_attn.k_proj.lora_A.weight"][0, 0] = torch.nan
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)
    save_file(tensors, bad / "adapter_model.safetensors")
    status, said = run("inspect", bad, "--model", folder / "model", "--tp", 2)
    assert status == 1
    assert "5 problems" in said
    for part in ("'use_dora'", "'lora_bias'", "layers.7.mlp.up_proj", "shape [4, 60]", "NaN or infinite"):
        assert part in said, part


def test_inspect_shows_every_field_with_a_wrong_value(folder: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(folder / "dense", tmp_path / "bad")
    config = json.loads((bad / "adapter_config.json").read_text()) | {"r": "8", "lora_alpha": 0, "bias": "all"}
    (bad / "adapter_config.json").write_text(json.dumps(config))
    (bad / "adapter_model.safetensors").unlink()
    status, said = run("inspect", bad, "--model", folder / "model")
    assert status == 1
    for part in ("4 problems", "'r'", "'lora_alpha'", "'bias'", "adapter_model.safetensors"):
        assert part in said, part


def test_inspect_refuses_a_degree_that_does_not_divide_the_model(folder: Path) -> None:
    status, said = run("inspect", folder / "dense", "--model", folder / "model", "--tp", 3)
    assert status == 2
    assert "choose a degree among 1, 2, 4, 8" in said


# --- convert --------------------------------------------------------------------------------------------------------


def change_of(folder: Path, site: str) -> torch.Tensor:
    """What a dense adapter adds to a site's weight, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    start = f"base_model.model.{site}.lora_"
    return 3.0 * tensors[f"{start}B.weight"].double() @ tensors[f"{start}A.weight"].double()


@pytest.mark.parametrize("name", SPECS)
def test_a_conversion_with_enough_rank_is_the_same_adapter(folder: Path, name: str, tmp_path: Path) -> None:
    """By PEFT on both sides: the original and the block-diagonal one that was written."""
    out = tmp_path / "out"
    rank = 2 * SPECS[name].rank
    status, said = run("convert", folder / name, out, "--nblocks", 2, "--rank", rank, "--model", folder / "model")
    assert status == 0, said
    assert "PEFT loads it" in said
    own = Reference(folder / "model", {"x": out}, torch.float64).logits(IDS, ["x"])
    expected = Reference(folder / "model", {"x": folder / name}, torch.float64).logits(IDS, ["x"])
    assert relative_error(own, expected) < 1e-4, "factors are stored in float32, which three layers amplify"
    assert json.loads((out / "adapter_config.json").read_text())["use_bdlora"]["nblocks"] == 2


@pytest.mark.parametrize("rank", [4, 8])
def test_a_conversion_is_the_nearest_there_is(folder: Path, rank: int, tmp_path: Path) -> None:
    """Against the singular values of each dense block of the change, formed in float64."""
    out = tmp_path / "out"
    arguments = ("--nblocks", 4, "--rank", rank, "--max-error", 1, "--model", folder / "model")
    status, said = run("convert", folder / "dense", out, *arguments)
    assert status == 0, said
    tensors = load_file(out / "adapter_model.safetensors")
    sites = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    for site in sites:
        is_column = site.endswith(COLUMN)
        blocks = change_of(folder / "dense", site).chunk(4, dim=0 if is_column else 1)
        values = [torch.linalg.svdvals(block).square() for block in blocks]
        best = (sum(own[rank // 4 :].sum() for own in values) / sum(own.sum() for own in values)) ** 0.5
        a, b = (tensors[f"base_model.model.{site}.lora_{factor}.weight"].double() for factor in "AB")
        if is_column:
            own = torch.cat([b_g @ a_g for a_g, b_g in zip(a.chunk(4), b.chunk(4), strict=True)])
        else:
            own = torch.cat([b_g @ a_g for a_g, b_g in zip(a.chunk(4), b.chunk(4, dim=1), strict=True)], dim=1)
        change = change_of(folder / "dense", site)
        error = float((own - change).norm() / change.norm())
        assert error == pytest.approx(float(best), rel=1e-5), site
        assert f"{site} │ {error:.4f}" in said


def test_a_conversion_that_loses_too_much_writes_nothing(folder: Path, tmp_path: Path) -> None:
    status, said = run(
        "convert", folder / "dense", tmp_path / "out", "--nblocks", 4, "--rank", 4, "--model", folder / "model"
    )
    assert status == 2
    assert "expected at most 0.3; choose a larger --rank (16 is always exact)" in said
    assert "all sites together" in said, "the errors are shown all the same"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nblocks", "3"], "features that blocks cut"),
        (["--nblocks", "4", "--rank", "6"], "expected a multiple of --nblocks 4; choose 8"),
    ],
)
def test_blocks_that_do_not_divide_are_refused(folder: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    status, text = run("convert", folder / "dense", tmp_path / "out", *arguments, "--model", folder / "model")
    assert status == 2
    assert said in text


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    arguments = ("--nblocks", 2, "--rank", 8, "--model", folder / "model")
    assert "something there" in run("convert", folder / "dense", tmp_path / "out", *arguments)[1]
    assert "something there" in run("merge", folder / "model", folder / "dense", tmp_path / "out")[1]


# --- merge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_a_merged_model_is_the_model_with_the_adapter(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PEFT, of a checkpoint in several files, row by row."""
    monkeypatch.setattr(adapter_merging, "_PIECE_BYTES", 3000)
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    status, said = run("merge", sharded, folder / name, tmp_path / "out")
    assert status == 0, said
    merged = Reference(tmp_path / "out", {}, torch.float64).logits(IDS, [None])
    reference = Reference(folder / "model", {"x": folder / name}, torch.float64)
    assert relative_error(merged, reference.logits(IDS, ["x"])) < 1e-4, "the sum is rounded to float32"
    assert relative_error(merged, reference.logits(IDS, [None])) > 1e-2


def test_a_merged_weight_is_rounded_once(folder: Path, tmp_path: Path) -> None:
    """bfloat16: as near as a sum in float64 that is rounded; other tensors stay bit for bit."""
    plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "model")
    assert run("merge", tmp_path / "model", folder / "dense", tmp_path / "out")[0] == 0
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        site = name.removesuffix(".weight")
        if site.endswith("_proj"):
            exact = before[name].double() + change_of(folder / "dense", site)
            # Half a unit in the last of 8 bits, and the float32 product's own error.
            assert torch.allclose(weight.double(), exact, rtol=2**-8 * 1.01, atol=1e-6), name
        else:
            assert torch.equal(weight, before[name]), name
    peft: Any = PeftModel.from_pretrained(plain, folder / "dense").merge_and_unload()
    own = after["model.layers.0.self_attn.q_proj.weight"]
    assert relative_error(own, peft.model.layers[0].self_attn.q_proj.weight) < 0.01


def test_a_checkpoint_without_the_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    status, said = run("merge", model, folder / "dense", tmp_path / "out")
    assert status == 2
    assert "model.layers.1.mlp.down_proj.weight: found no such tensor" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["convert", "merge"])
@pytest.mark.parametrize("where", ["first file", "second file"])
def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, command: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written when it happens: the weights, or the configuration."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    calls = {
        ("convert", "first file"): (adapter_conversion, "save_file"),
        ("convert", "second file"): (Path, "write_text"),
        ("merge", "first file"): (shutil, "copyfile"),
        ("merge", "second file"): (adapter_merging, "_write_merged"),
    }
    monkeypatch.setattr(*calls[command, where], full)
    before = sorted(path.name for path in tmp_path.iterdir())
    if command == "convert":
        arguments: tuple[object, ...] = (folder / "dense", tmp_path / "out", "--nblocks", 2, "--rank", 8)
        status, said = run(command, *arguments, "--model", folder / "model")
    else:
        status, said = run(command, folder / "model", folder / "dense", tmp_path / "out")
    assert status == 2
    assert "No space left on device" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- the vocabulary -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose embedding is as high as wide, so that no shape tells a transposed weight; adapters on both ends."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for tied in (False, True):
        name = "tied" if tied else "untied"
        model = save_model(ModelSpec(layers=1, vocabulary=64, tied=tied), folder / name)
        save_adapter(AdapterSpec(rank=4, targets=(*VOCABULARY, "q_proj")), model, folder / f"{name}-both")
    save_adapter(AdapterSpec(rank=4, targets=("lm_head", "q_proj")), folder / "untied", folder / "head")
    return folder


def test_an_embedding_is_merged_transposed(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_merging, "_PIECE_BYTES", 3000)
    status, said = run("merge", vocabulary / "untied", vocabulary / "untied-both", tmp_path / "out")
    assert status == 0, said
    merged = Reference(tmp_path / "out", {}, torch.float64).logits(IDS % 64, [None])
    reference = Reference(vocabulary / "untied", {"x": vocabulary / "untied-both"}, torch.float64)
    assert relative_error(merged, reference.logits(IDS % 64, ["x"])) < 1e-4, "the sum is rounded to float32"
    assert relative_error(merged, reference.logits(IDS % 64, [None])) > 1e-2


def test_a_tied_weight_is_not_merged(vocabulary: Path, tmp_path: Path) -> None:
    status, said = run("merge", vocabulary / "tied", vocabulary / "tied-both", tmp_path / "out")
    assert status == 2
    assert "the weight of lm_head too (tied)" in said
    assert not (tmp_path / "out").exists()


def test_logits_are_converted_and_embeddings_refused(vocabulary: Path, tmp_path: Path) -> None:
    arguments = ("--nblocks", 2, "--rank", 8, "--model", vocabulary / "untied")
    status, said = run("convert", vocabulary / "untied-both", tmp_path / "out", *arguments)
    assert status == 2
    assert "model.embed_tokens: found LoRA on an embedding" in said
    status, said = run("convert", vocabulary / "head", tmp_path / "out", *arguments)
    assert status == 0, said
    own = Reference(vocabulary / "untied", {"x": tmp_path / "out"}, torch.float64).logits(IDS % 64, ["x"])
    expected = Reference(vocabulary / "untied", {"x": vocabulary / "head"}, torch.float64).logits(IDS % 64, ["x"])
    assert relative_error(own, expected) < 1e-4


@pytest.mark.parametrize("tp", [1, 2])
def test_inspect_tells_what_a_rank_holds_of_the_vocabulary(vocabulary: Path, tp: int) -> None:
    adapter = vocabulary / "untied-both"
    status, said = run("inspect", adapter, "--model", vocabulary / "untied", "--tp", tp)
    assert status == 0, said
    model, adapters = bd.load(vocabulary / "untied", {"x": adapter}, ranks=bd.Ranks.lockstep(tp))
    held = max(rank.bank.used_elements() * 4 for rank in model.bdlora.ranks)
    assert f"3 sites, {held:,} bytes on a rank" in said
    fit = adapters.stats()
    assert fit.ordinary_fit == fit.slots, "the pool has room for as many ordinary ones, the vocabulary's sites included"
    if tp == 2:
        assert fit.block_diagonal_fit is not None
        assert fit.block_diagonal_fit > fit.ordinary_fit


def test_inspect_pairs_what_it_can_at_an_embedding(vocabulary: Path, tmp_path: Path) -> None:
    """One factor is missing; the value of another one is wrong: both are said."""
    bad = shutil.copytree(vocabulary / "untied-both", tmp_path / "bad")
    tensors = load_file(bad / "adapter_model.safetensors")
    start = "base_model.model.model."
    del tensors[f"{start}layers.0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{start}embed_tokens.lora_embedding_A"][0, 0] = torch.nan
    save_file(tensors, bad / "adapter_model.safetensors")
    status, said = run("inspect", bad, "--model", vocabulary / "untied")
    assert status == 1
    assert "2 problems" in said
    assert "1 missing" in said
    assert "NaN or infinite" in said
