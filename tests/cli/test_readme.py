"""What the README tells people to type: options that exist, files that are there, and Python that runs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bdlora_compile.cli import app
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's blocks of a language; shell has none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [block for own, block in found if own == language]


def commands() -> Iterator[list[str]]:
    """The words of each line of the shell blocks."""
    for block in blocks(""):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def parsed(words: list[str]) -> None:
    """Parse a command of ours as it would be, without running it."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("bdlora", words[:1], resilient_parsing=True)
    while hasattr(command, "get_command"):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
    strict = type(context)(command, info_name=command.name)
    command.make_parser(strict).parse_args(list(words))


def check(words: list[str]) -> None:
    """A line can be typed as it stands."""
    program, *rest = words
    match Path(program).name:
        case "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {rest[0]}"
        case "bdlora":
            parsed(rest)
        case "torchrun":
            assert (ROOT / rest[-1]).is_file(), f"no file {rest[-1]}"
        case other:
            raise AssertionError(f"nobody checks {other}")


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_can_be_typed(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("line", ["make cake", "bdlora bake", "bdlora serve MODEL --tq 2", "torchrun no.py", "rm x"])
def test_wrong_lines_are_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|no target|no command|no file|nobody checks"):
        check(shlex.split(line))


def test_the_first_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in the place of the reader's."""
    snippet, *_ = blocks("python")
    model = save_model(ModelSpec(layers=1), tmp_path / "path/or/hub-id")
    for seed, name in enumerate(("math", "code", "law")):
        save_adapter(AdapterSpec(rank=4), model, tmp_path / "adapters" / name, seed)
    letters = Tokenizer(models.WordLevel({"<pad>": 0, "a": 3, "b": 4}, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>").save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names: dict[str, Any] = {"texts": ["ab", "b", "aba"]}
    exec(compile(snippet, "README.md", "exec"), names)
    assert sorted(names["adapters"].names) == ["code", "law", "math"]
    assert names["batch"]["attention_mask"].tolist()[1] == [0, 0, 1]
    assert names["batch"]["input_ids"].device.type == ("cuda" if torch.cuda.is_available() else "cpu")
