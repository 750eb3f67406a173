"""`bdlora run` on a tiny random model: what it prints, and what it says about bad input."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from bdlora_compile import decode
from bdlora_compile.cli import app
from bdlora_compile.commands.common import parse_adapters
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

runner = CliRunner()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a tokenizer of single letters, and an adapter."""
    folder = tmp_path_factory.mktemp("cli")
    model = save_model(ModelSpec(layers=1), folder / "model")
    letters = {chr(97 + index): 3 + index for index in range(26)}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(model)
    return model, save_adapter(AdapterSpec(rank=4, nblocks=2), model, folder / "adapter")


@pytest.mark.timeout(280)
def test_two_ranks_answer_as_peft_does(files: tuple[Path, Path]) -> None:
    """The whole way: processes are started, every row is decoded and checked against PEFT's eager result."""
    model, adapter = files
    command = [sys.executable, "-c", "from bdlora_compile.cli import app; app()", "run", str(model)]
    command += ["--adapter", f"ours={adapter}", "--tp", "2", "--prompt", "abc", "--new-tokens", "4", "--check"]
    command += ["--strategy", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=260, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "2 rows x 4 tokens against PEFT: all equal" in done.stdout
    assert "ours" in done.stdout
    assert "mlp.down_proj: local, every adapter is block-diagonal here," in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("nopath", "found no ="),
        ("/some/path", "write NAME=/some/path"),
        ("name=/nowhere", "found no folder /nowhere"),
        ("=x", "found no folder x"),
        ("=.", "found no name"),
    ],
)
def test_a_bad_adapter_argument_is_named(files: tuple[Path, Path], pair: str, said: str) -> None:
    result = runner.invoke(app, ["run", str(files[0]), "--prompt", "a", "--adapter", pair])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize("command", [["run", "--prompt", "a"], ["serve"], ["explain"]], ids=lambda it: it[0])
def test_two_adapters_of_one_name_are_refused(files: tuple[Path, Path], tmp_path: Path, command: list[str]) -> None:
    """No folder is left out in silence, whichever command it is given to."""
    model, adapter = files
    name, *options = command
    options += ["--adapter", f"ours={adapter}", "--adapter", f"ours={tmp_path}"]
    result = runner.invoke(app, [name, str(model), *options])
    assert result.exit_code == 2
    # A narrow terminal wraps paths too.
    said = "".join(result.output.split())
    told = (
        f"--adapter 'ours': found two folders, {adapter} and {tmp_path}, expected one folder for each name; rename one"
    )
    assert "".join(told.split()) in said


def test_a_rank_that_torchrun_started_refuses_them_too(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = files
    pairs = [f"--adapter=ours={adapter}", f"--adapter=ours={tmp_path}"]
    with pytest.raises(SystemExit, match="2"):
        decode.main([str(model), *pairs])
    assert "found two folders" in capsys.readouterr().err


def test_two_adapters_of_two_names_are_parsed(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The twin; a path may have a = in it."""
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert parse_adapters([f"ours={files[1]}", f"theirs={odd}"]) == {"ours": files[1], "theirs": odd}


@pytest.mark.timeout(280)
def test_ranks_that_do_not_divide_the_heads_are_refused(files: tuple[Path, Path]) -> None:
    """What a rank finds reaches the user in one line, without a trace."""
    command = [sys.executable, "-c", "from bdlora_compile.cli import app; app()", "run", str(files[0])]
    command += ["--tp", "3", "--prompt", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=260, check=False)
    assert done.returncode == 2, done.stdout + done.stderr[-3000:]
    assert "choose a degree among 1, 2, 4, 8" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_no_command_shows_the_commands() -> None:
    assert "run" in runner.invoke(app, []).output


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Before any process is started."""
    result = runner.invoke(app, ["run", str(tmp_path / "missing"), "--prompt", "a"])
    assert result.exit_code == 2
    assert "no such folder" in " ".join(result.output.split())


@pytest.mark.parametrize("arguments", [["calibrate"], ["run", "MODEL", "--prompt", "a"], ["serve", "MODEL"]])
def test_processes_of_torchrun_start_no_others(files: tuple[Path, Path], arguments: list[str]) -> None:
    """Each would start all ranks, on the same GPUs; the other tests are the twin."""
    told = [str(files[0]) if argument == "MODEL" else argument for argument in arguments]
    result = runner.invoke(app, told, env={"TORCHELASTIC_RUN_ID": "outer"})
    assert result.exit_code == 2
    assert "found a process of torchrun, expected a shell" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "ADAPTER"],
        ["adapters", "inspect", "ADAPTER", "--model", "ADAPTER"],
        ["adapters", "merge", "ADAPTER", "MODEL", "OUT"],
    ],
    ids=" ".join,
)
def test_an_adapter_in_the_place_of_a_model_is_named(
    files: tuple[Path, Path], tmp_path: Path, arguments: list[str]
) -> None:
    """transformers would say that a model_type is missing."""
    places = {"ADAPTER": str(files[1]), "MODEL": str(files[0]), "OUT": str(tmp_path / "out")}
    result = runner.invoke(app, [places.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2
    assert "found an adapter's folder, expected a Hugging Face model folder" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "--tp", "1", "--out", "missing/machine.json"],
        ["explain", "--config", "llama-3.2-1b", "--html", "missing/page.html"],
        ["diff", "a.json", "b.json", "--json", "missing/told.json"],
    ],
    ids=" ".join,
)
def test_a_result_without_a_folder_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "found no folder missing, expected one that exists" in " ".join(result.output.split())


@pytest.mark.parametrize("arguments", [["convert", "ADAPTER", "OUT"], ["merge", "MODEL", "ADAPTER", "OUT"]])
def test_a_folder_that_is_there_is_not_written_over(
    files: tuple[Path, Path], tmp_path: Path, arguments: list[str]
) -> None:
    """Said before the work."""
    places = {"ADAPTER": str(files[1]), "MODEL": str(files[0]), "OUT": str(tmp_path)}
    extra = ["--nblocks", "2"] if arguments[0] == "convert" else []
    result = runner.invoke(app, ["adapters", *(places.get(argument, argument) for argument in arguments), *extra])
    assert result.exit_code == 2
    assert "found something there, expected a new folder" in " ".join(result.output.split())


def test_an_unknown_setting_of_a_file_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    settings = tmp_path / "serve.toml"
    settings.write_text("max_rowz = 4\n")
    result = runner.invoke(app, ["serve", str(files[0]), "--config", str(settings)])
    assert result.exit_code == 2
    assert "max_rowz: found an unknown setting, expected one of model, " in " ".join(result.output.split())
