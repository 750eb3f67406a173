"""An adapter merged into the base weights, W' = W + s B A, checkpoint file by file and piece by piece.

A checkpoint of any size needs the memory of one piece: the tensors of a merged file have the names, types and shapes
of the file they come from, so its header is the old one, and the data follow in the same order.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import safe_open
from torch import Tensor

from bdlora_compile.errors import AdapterError, ConfigError
from bdlora_compile.factors import dense_a, dense_b
from bdlora_compile.new_folder import require_new
from bdlora_compile.runtime.adapter_file import Adapter, LoraFactors
from bdlora_compile.sites import Site

_PIECE_BYTES: Final = 64_000_000
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_TYPES: Final = ("F64", "F32", "F16", "BF16")

Progress = Callable[[str], None]


def merge_adapter(
    model: Path, adapter: Adapter, sites: Mapping[str, Site], out: Path, progress: Progress = lambda _: None
) -> None:
    """Write the model with the adapter in its weights; ``out`` appears whole or not at all.

    Products are taken in float32 (float64 for float64 weights) and rounded once to the weight's type.

    Args:
        model: a Hugging Face folder with safetensors weights.
        adapter: of any kind.
        sites: the model's sites.
        out: the folder to write.
        progress: called with the name of each tensor that was written.

    Raises:
        ConfigError: something is at ``out`` already, or the model has no safetensors weights.
        AdapterError: a site's weight is not in the checkpoint, is another layer's too, or has a type that cannot carry
            the sum; or the adapter holds NaN or infinity.
    """
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            str(model), found="no safetensors weights", expected="a Hugging Face model folder", remedy="check the path"
        )
    require_new(out)
    headers = {file: _header(file) for file in files}
    _check_weights(adapter, sites, headers)
    adapter.check_finite()
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for entry in model.iterdir():
            if entry.is_file() and entry.suffix not in _WEIGHTS:
                shutil.copyfile(entry, beside / entry.name)
        with adapter.opened():
            for file in files:
                _merge_file(file, headers[file], adapter, sites, beside / file.name, progress)
        os.chmod(beside, 0o755)  # what mkdtemp made is for its owner alone
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


Header = Mapping[str, Mapping[str, Any]]
"""What safetensors has checked: dtype, shape and data_offsets of each tensor."""


def _header(file: Path) -> Header:
    """The tensors of a file in the order of their data; checked by safetensors itself first."""
    with safe_open(file, framework="pt"):
        pass
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]))


def _check_weights(adapter: Adapter, sites: Mapping[str, Site], headers: Mapping[Path, Header]) -> None:
    stored = {name: entry for header in headers.values() for name, entry in header.items()}
    for name in adapter.factors:
        _refuse_tied(sites[name], sites)
        entry = stored.get(f"{name}.weight")
        shape = [sites[name].out_features, sites[name].in_features]
        if sites[name].is_lookup:
            shape.reverse()
        if entry is None or entry["dtype"] not in _TYPES or entry["shape"] != shape:
            raise AdapterError(
                f"{name}.weight",
                found="no such tensor in the checkpoint" if entry is None else f"{entry['dtype']} {entry['shape']}",
                expected=f"one of {', '.join(_TYPES)} of shape {shape}",
                remedy="merge into the unquantised checkpoint that the adapter was trained on",
            )


def _refuse_tied(site: Site, sites: Mapping[str, Site]) -> None:
    """A weight that two layers share would change both of them, where the adapter changes one."""
    sharing = [other.name for other in sites.values() if other.weight == site.weight and other.name != site.name]
    if sharing:
        raise AdapterError(
            f"{site.name}.weight",
            found=f"the weight of {', '.join(sharing)} too (tied)",
            expected="a weight that no other layer shares",
            remedy="serve the adapter as it is, or untie the model (tie_word_embeddings=False) and save it first",
        )


def _merge_file(
    file: Path, header: Header, adapter: Adapter, sites: Mapping[str, Site], target: Path, progress: Progress
) -> None:
    with safe_open(file, framework="pt") as weights, file.open("rb") as source, target.open("wb") as into:
        length = int.from_bytes(source.read(8), "little")
        source.seek(0)
        into.write(source.read(8 + length))
        for name, entry in header.items():
            factors = adapter.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if factors is None:
                _copy(source, into, 8 + length, entry)
            else:
                _write_merged(weights.get_slice(name), factors, sites[factors.site], into)
            progress(name)


def _copy(source: BinaryIO, into: BinaryIO, start: int, entry: Mapping[str, Any]) -> None:
    begin, end = entry["data_offsets"]
    source.seek(start + begin)
    left = end - begin
    while left:
        piece = source.read(min(left, _PIECE_BYTES))
        into.write(piece)
        left -= len(piece)


def _write_merged(weight: Any, factors: LoraFactors, site: Site, into: BinaryIO) -> None:
    rows, columns = weight.get_shape()
    change_of = _change_of_rows(factors, site)
    step = max(_PIECE_BYTES // (8 * columns), 1)
    for start in range(0, rows, step):
        own = slice(start, min(start + step, rows))
        part = weight[own]
        wide = torch.float64 if part.dtype is torch.float64 else torch.float32
        merged = (part.to(wide) + change_of(own, wide)).to(part.dtype)
        if not torch.isfinite(merged).all():
            raise AdapterError(
                f"{factors.site}.weight",
                found=f"values that {part.dtype} cannot hold after merging",
                expected="finite numbers",
                remedy="merge into a checkpoint of a wider type",
            )
        into.write(_bytes(merged))


def _change_of_rows(factors: LoraFactors, site: Site) -> Callable[[slice, torch.dtype], Tensor]:
    """The change of some rows of the stored weight: of s B A, or of its transpose at an embedding."""
    if site.is_lookup:
        whole = dense_b(factors, slice(0, site.out_features), site.out_features).t()

        def left(own: slice) -> Tensor:
            return dense_a(factors, own, site.in_features).t()
    else:
        whole = dense_a(factors, slice(0, site.in_features), site.in_features)

        def left(own: slice) -> Tensor:
            return dense_b(factors, own, site.out_features)

    return lambda own, wide: factors.scaling * (left(own).to(wide) @ whole.to(wide))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
