"""Configurations and safetensors files of any content: served, or refused by an error of ours, and no growth.

150 examples of each kind, the same ones in each run; `make nightly` draws 500 new ones.
"""

import gc
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_config import AdapterConfig, BlockDiagonalConfig
from bdlora_compile.runtime.adapter_fields import HARMLESS, REFUSED
from bdlora_compile.runtime.adapter_file import adapter_from_tensors, read_adapter
from bdlora_compile.runtime.adapter_version import content_digest
from bdlora_compile.runtime.adapter_weights import MAX_HEADER_BYTES
from bdlora_compile.sites import Role, Site

SITE = "model.layers.0.self_attn.q_proj"
SITES = {SITE: Site(SITE, Role.COLUMN, 24, 32), "model.layers.0.mlp.down_proj": Site("d", Role.ROW, 48, 24)}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
TENSORS = {
    f"base_model.model.{SITE}.lora_A.weight": torch.ones(4, 24),
    f"base_model.model.{SITE}.lora_B.weight": torch.ones(32, 4),
}
FILE = save(TENSORS)
LENGTH = int.from_bytes(FILE[:8], "little")
FIELDS = sorted({*AdapterConfig.model_fields, *HARMLESS, *REFUSED, "unknown", "__class__", ""})

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["q_proj", "all-linear", ".*", "(", "LORA", "1", "\ud800", "\0", "model.layers.0.self_attn.q_proj"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*FIELDS, "q_proj"]), inner, max_size=4)
    ),
    max_leaves=6,
)
blocks = st.dictionaries(st.sampled_from([*BlockDiagonalConfig.model_fields, "other"]), values, max_size=4)
configs = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5)
relaxed = settings(
    max_examples=max(150, settings().max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def serve(config: Any) -> None:
    """Check an adapter with good tensors, and read all of it."""
    try:
        content_digest(adapter_from_tensors(config, TENSORS, SITES, source="fuzz"))
    except AdapterError as error:
        assert len(str(error)) < 5000


@relaxed
@given(configs)
def test_any_fields(config: dict[str, Any]) -> None:
    serve(CONFIG | config)
    serve(config)


@relaxed
@given(blocks | values)
def test_any_block_fields(block: Any) -> None:
    serve(CONFIG | {"use_bdlora": block})


@relaxed
@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")))
@example(b'{"peft_type": "LORA", "r": 1e999}')
@example(b"{" * 5000)
def test_any_config_file(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(FILE)
    with pytest.raises(AdapterError):
        read_adapter(tmp_path, SITES)


def read(folder: Path, data: bytes) -> bool:
    """Read an adapter of these weights whole; whether it was served."""
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(data)
    try:
        content_digest(read_adapter(folder, SITES))
    except AdapterError as error:
        assert len(str(error)) < 5000
        return False
    return True


def test_the_file_that_is_changed_below_is_served(tmp_path: Path) -> None:
    assert read(tmp_path, FILE)


@relaxed
@given(st.integers(0, len(FILE) - 1))
def test_a_file_cut_anywhere(tmp_path: Path, size: int) -> None:
    assert not read(tmp_path, FILE[:size])


@relaxed
@given(st.integers(0, 8 + LENGTH - 1), st.integers(0, 255))
def test_a_header_with_any_byte_changed(tmp_path: Path, place: int, value: int) -> None:
    read(tmp_path, FILE[:place] + bytes([value]) + FILE[place + 1 :])


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I8", "F8_E4M3", "BOOL", "C64", "", "F99"]) | values,
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | st.sampled_from([[4, 24], [32, 4], [0, 24]]) | values,
        "data_offsets": st.lists(st.integers(0, 2**64), max_size=3) | st.sampled_from([[0, 384], [384, 896]]) | values,
    }
)


@relaxed
@given(st.dictionaries(st.sampled_from([*TENSORS, "__metadata__", "", "x" * 5000, "\ud800"]), entries | values))
def test_any_header(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    read(tmp_path, len(text).to_bytes(8, "little") + text + FILE[8 + LENGTH :])


def test_a_header_above_the_limit_is_refused_by_its_length(tmp_path: Path) -> None:
    """Before a reader takes it in: the file is sparse, and of that size."""
    path = tmp_path / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(AdapterError, match="a header of at most"):
        read_adapter(tmp_path, SITES)


def test_a_large_file_is_refused_by_its_shapes(tmp_path: Path) -> None:
    """Ten gigabytes, which nobody reads: the file is sparse."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 65536}))
    shapes, entries, size = [[10**8, 24], [32, 65536]], {}, 0
    for name, shape in zip(TENSORS, shapes, strict=True):
        end = size + 4 * shape[0] * shape[1]
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}
        size = end
    text = json.dumps(entries).encode()
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    start = time.monotonic()
    with pytest.raises(AdapterError, match=r"lora_A.weight: found shape \[100000000, 24\]"):
        read_adapter(tmp_path, SITES)
    assert time.monotonic() - start < 5


def test_refused_files_leave_no_memory(tmp_path: Path) -> None:
    """After some hundreds that fill caches, three hundred more leave what ten leave.

    A leak grows each time; what other tests of the process left behind grows once (a cache, a warning's registry).
    """

    def rounds(count: int) -> None:
        for index in range(count):
            read(tmp_path, FILE[: index % len(FILE)])
            serve(CONFIG | {"r": -index, "target_modules": [f"name{index}"]})

    def growth() -> int:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        rounds(300)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    rounds(400)
    tracemalloc.start()
    try:
        rounds(10)
        assert any(growth() < 50_000 for _ in range(3))
    finally:
        tracemalloc.stop()
