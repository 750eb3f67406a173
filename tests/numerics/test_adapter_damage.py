"""Files of an adapter that are missing, damaged, hostile or not what they seem are refused by name."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime import adapter_targets, adapter_weights
from bdlora_compile.runtime.adapter_file import Adapter, adapter_from_tensors, read_adapter
from bdlora_compile.runtime.adapter_tensors import check_finite, is_finite
from bdlora_compile.sites import Role, Site

SITE = "model.layers.0.self_attn.q_proj"
SITES = {SITE: Site(SITE, Role.COLUMN, 24, 32)}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
JSON, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_tensors() -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{SITE}"
    return {f"{prefix}.lora_A.weight": torch.randn(4, 24), f"{prefix}.lora_B.weight": torch.randn(32, 4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter."""
    (tmp_path / JSON).write_text(json.dumps(CONFIG))
    save_file(make_tensors(), tmp_path / WEIGHTS)
    return tmp_path


def header(text: str, size: int | None = None) -> bytes:
    """A safetensors file of a header alone, with the length that it claims."""
    return (len(text) if size is None else size).to_bytes(8, "little") + text.encode()


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def append(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def unlink(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return act


@dataclass(frozen=True)
class Damage:
    """What is done to a good adapter, the file that the error names, and parts of the rest of the error."""

    name: str
    act: Callable[[Path], object]
    file: str
    found: str
    expected: str
    remedy: str


def damaged_json(name: str, data: bytes, found: str) -> Damage:
    return Damage(name, write(JSON, data), JSON, found, "a JSON object", "save_pretrained")


def damaged_weights(name: str, act: Callable[[Path], object]) -> Damage:
    return Damage(name, act, WEIGHTS, "no valid safetensors", "a whole safetensors file", "save the adapter again")


OVERLAP = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}'
TWICE = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
FOLDER = "give the folder that PEFT's save_pretrained wrote"
DAMAGES = [
    Damage("no config", unlink(JSON), JSON, "nothing readable (No such file", "the configuration", FOLDER),
    Damage("config is a pipe", replace(JSON, os.mkfifo), JSON, "a pipe", "a plain file", FOLDER),
    Damage("config is a folder", replace(JSON, os.mkdir), JSON, "", "", FOLDER),
    Damage("config is a pointer", write(JSON, POINTER), JSON, "a Git LFS pointer", "the file itself", "git lfs pull"),
    Damage("large config", write(JSON, b" " * 2_000_000), JSON, "more than 1000000 bytes", "kilobytes", "save"),
    damaged_json("empty config", b"", "an empty file"),
    damaged_json("cut config", b'{"r": 8', "no valid JSON (Expecting"),
    damaged_json("a list", b"[1]", "the JSON value [1]"),
    damaged_json("null", b"null", "the JSON value None"),
    damaged_json("deep nesting", b"[" * 900_000, "no valid JSON (maximum recursion depth"),
    damaged_json("a huge number", b'{"r": ' + b"1" * 9000 + b"}", "no valid JSON (Exceeds the limit"),
    damaged_json("bytes", b"\xff\xfe\x00\xd8", "no valid JSON"),
    damaged_json("a name twice", b'{"r": 8, "r": 16}', "a name occurs twice"),
    Damage("no weights", unlink(WEIGHTS), WEIGHTS, "nothing readable (No such file", "the weights", FOLDER),
    Damage("weights are a pipe", replace(WEIGHTS, os.mkfifo), WEIGHTS, "a pipe", "a plain file", "copy it again"),
    Damage("weights are a pointer", write(WEIGHTS, POINTER), WEIGHTS, "a Git LFS pointer", "itself", "git lfs pull"),
    Damage(
        "a pickle",
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "adapter_model.bin",
        "weights in a pickle",
        "adapter_model.safetensors",
        'python -c "import torch; from safetensors.torch import save_file;',
    ),
    damaged_weights("empty weights", write(WEIGHTS, b"")),
    damaged_weights("cut in the length", cut(WEIGHTS, 4)),
    damaged_weights("cut in the header", cut(WEIGHTS, 40)),
    damaged_weights("cut in the data", cut(WEIGHTS, -4)),
    damaged_weights("more than the header says", append(WEIGHTS, b"xxxx")),
    damaged_weights("length of 2^63", write(WEIGHTS, header("{}", 2**63))),
    damaged_weights("overlapping offsets", write(WEIGHTS, header(OVERLAP) + bytes(6))),
    damaged_weights("a tensor twice", write(WEIGHTS, header(TWICE) + bytes(8))),
    damaged_weights("a header that is no JSON", write(WEIGHTS, header("{nonsense"))),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damaged_file_is_named(damage: Damage, folder: Path) -> None:
    damage.act(folder)
    with pytest.raises(AdapterError) as info:
        read_adapter(folder, SITES)
    assert info.value.where == str(folder / damage.file)
    assert damage.found in info.value.found
    assert damage.expected in info.value.expected
    assert damage.remedy in info.value.remedy


def test_good_folder_is_read(folder: Path) -> None:
    """The control of the table above."""
    assert list(read_adapter(str(folder), SITES).factors) == [SITE]


@pytest.mark.parametrize(("path", "found"), [("nowhere", "nothing"), (WEIGHTS, "a file")])
def test_path_that_is_no_folder(path: str, found: str, folder: Path) -> None:
    with pytest.raises(AdapterError) as info:
        read_adapter(folder / path, SITES)
    assert info.value.where == str(folder / path)
    assert info.value.found == found
    assert "adapter_model.safetensors" in info.value.expected


@pytest.mark.parametrize("sabotage", [False, True])
def test_a_swap_while_a_file_is_opened_changes_nothing(
    folder: Path, tmp_path: Path, sabotage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file comes to the path after the one there was compared with the checked one, and before it is mapped."""
    adapter = read_adapter(folder, SITES)
    checked = adapter.factors[SITE].a.view().clone()
    other = tmp_path / "other.safetensors"
    save_file(make_tensors(), other)

    def swap_and_open(name: Path, framework: str) -> object:
        other.replace(folder / WEIGHTS)
        return safe_open(folder / WEIGHTS if sabotage else name, framework=framework)

    monkeypatch.setattr(adapter_weights, "safe_open", swap_and_open)
    assert torch.equal(adapter.factors[SITE].a.view(), checked) is not sabotage
    with pytest.raises(AdapterError, match="another file than the one that was checked"):
        adapter.factors[SITE].a.view()


def test_a_file_that_is_written_to_while_it_is_read_is_refused(folder: Path) -> None:
    adapter = read_adapter(folder, SITES)
    descriptors = len(os.listdir("/proc/self/fd"))

    def read() -> None:
        with adapter.opened():
            time.sleep(0.02)  # a file system may count time in steps of some milliseconds
            with (folder / WEIGHTS).open("r+b") as file:
                file.write(b"\0")

    with pytest.raises(AdapterError, match="put a new one in its place by renaming"):
        read()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_dtype_of_a_file(folder: Path) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in make_tensors().items()}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"dtype F8_E4M3, expected float32, float16, bfloat16 or float64; convert"):
        read_adapter(folder, SITES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
def test_values_that_are_not_finite_are_named(value: float, in_memory: bool, folder: Path) -> None:
    tensors = make_tensors()
    tensors[f"base_model.model.{SITE}.lora_A.weight"][2, 7] = value
    save_file(tensors, folder / WEIGHTS)
    adapter: Adapter = read_adapter(folder, SITES)
    if in_memory:
        adapter = adapter_from_tensors(CONFIG, tensors, SITES, source=str(folder))
    check_finite(adapter.factors[SITE].b)
    with pytest.raises(AdapterError) as info:
        adapter.check_finite()
    assert f"{SITE}.lora_A.weight of {folder}" in info.value.where
    assert info.value.found == "1 values that are NaN or infinite"
    assert info.value.expected == "finite numbers"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype) -> None:
    """Also between values that are huge, denormal or zero: their sum may overflow, and they are finite."""
    info = torch.finfo(dtype)
    values = torch.tensor([info.max, info.max, info.min, info.tiny / 2, -0.0, 1.0], dtype=dtype).repeat(20)
    assert is_finite(values)
    assert is_finite(values[:0])
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in range(len(values)):
            changed = values.clone()
            changed[place] = value
            assert not is_finite(changed), (value, place)


BOMBS = ["(a+)+$", "(?:(?:(?:.|a)*)*)*!", r"(\w+\.?)+[^\w.]", "(.*)*q(.*)*9", "(?:a{1000}){1000}", "(x+x+)+y"]


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_no_expression_holds_up_the_reader(bomb: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_targets, "_PATTERN_SECONDS", 0.2)
    config = CONFIG | {name: {bomb: 4} if name.endswith("pattern") else bomb}
    start = time.monotonic()
    with contextlib.suppress(AdapterError):
        adapter_from_tensors(config, make_tensors(), SITES, source="bomb")
    assert time.monotonic() - start < 5


def test_expression_that_runs_out_of_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_targets, "_PATTERN_SECONDS", 0.2)
    name = "model." + "ab" * 40 + ".q_proj"
    sites = {name: Site(name, Role.COLUMN, 24, 32)}
    config = CONFIG | {"exclude_modules": r"model\.(?:(?:a|b|ab)+)+(?<!.q)\.z?q_proj(?<=x)"}
    with pytest.raises(AdapterError, match=r"'exclude_modules'.*an expression that took more than 0.2 s"):
        adapter_from_tensors(config, {}, sites, source="bomb")
