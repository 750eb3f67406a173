"""Read ``adapter_config.json`` of a PEFT LoRA adapter: every field is honoured, harmless, or refused by name.

The fields are those of ``LoraConfig`` in PEFT 0.21.2; a test compares the three groups with the installed PEFT:

    honoured   the fields of ``AdapterConfig``, with the defaults of PEFT
    harmless   ``adapter_fields.HARMLESS``: they act while training only, or another field decides
    refused    ``adapter_fields.REFUSED``: they change the model in a way that factors A and B cannot express

A field of none of the groups comes from another version of PEFT or from another tool; it is reported, not refused.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_fields import HARMLESS, LFS_POINTER, REFUSED, config_error, short, some

MAX_CONFIG_BYTES: Final = 1_000_000
"""PEFT writes 1 to 3 kB, and 70 kB for 80 layers with a rank and an alpha for each site."""
MAX_RANK: Final = 65_536
"""Wider than any hidden size in use: a larger number is a slip, and would overflow the sizes computed from it."""

_FLOAT32_MAX: Final = 3.4e38
_FLOAT32_TINY: Final = 1.2e-38

_BASE_KEEPING_INITS: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_CONVERTIBLE_INITS: Final = ("pissa", "corda", "olora", "lora_ga")


def _check_alpha(alpha: float) -> float:
    if not _FLOAT32_TINY <= abs(alpha) <= _FLOAT32_MAX:
        raise ValueError("alpha outside of the range")
    return alpha


Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_check_alpha)]

_RANK_TEXT: Final = f"a whole number from 1 to {MAX_RANK}"
_ALPHA_TEXT: Final = "a finite number other than 0 that float32 can hold (0 would serve the base model unchanged)"
_NAMES_TEXT: Final = "a list of names, a regular expression, or null"


class BlockDiagonalConfig(BaseModel):
    """The object ``use_bdlora``; names match as substrings of the full module name."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    target_modules_bd_a: list[str] | None = Field(default=None, description="a list of names, or null")
    target_modules_bd_b: list[str] | None = Field(default=None, description="a list of names, or null")
    nblocks: Rank = Field(default=1, description=_RANK_TEXT)
    match_strict: bool = Field(default=True, description="true or false")


class AdapterConfig(BaseModel):
    """The fields of ``adapter_config.json`` that are honoured, with the defaults of PEFT."""

    # No text becomes a number and no number a truth value: a wrong type is a wrong file.
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    peft_type: Literal["LORA"] = Field(description="'LORA'")
    base_model_name_or_path: str | None = Field(default=None, description="a name, or null")
    revision: str | None = Field(default=None, description="a revision of the base model, or null")
    r: Rank = Field(default=8, description=_RANK_TEXT)
    lora_alpha: Alpha = Field(default=8.0, description=_ALPHA_TEXT)
    use_rslora: bool = Field(default=False, description="true or false")
    rank_pattern: dict[str, Rank] | None = Field(
        default=None, description=f"an object of module patterns, each with {_RANK_TEXT}"
    )
    alpha_pattern: dict[str, Alpha] | None = Field(
        default=None, description=f"an object of module patterns, each with {_ALPHA_TEXT}"
    )
    target_modules: list[str] | str | None = Field(
        default=None, description="a list of names, a regular expression or 'all-linear'"
    )
    exclude_modules: list[str] | str | None = Field(default=None, description=_NAMES_TEXT)
    layers_to_transform: list[int] | int | None = Field(
        default=None, description="a list of layer numbers, a layer number, or null"
    )
    layers_pattern: list[str] | str | None = Field(default=None, description=_NAMES_TEXT)
    ensure_weight_tying: bool = Field(default=False, description="true or false")
    init_lora_weights: bool | str | None = Field(default=True, description="true, false or the name of a method")
    use_bdlora: BlockDiagonalConfig | None = Field(
        default=None, description="null or an object with target_modules_bd_a, target_modules_bd_b and nblocks"
    )


def read_config(path: Path) -> dict[str, object]:
    """Read the JSON object of ``adapter_config.json``.

    Raises:
        AdapterError: the file is missing, not a plain file, empty, above ``MAX_CONFIG_BYTES``, or holds no object.
    """
    where, remedy = str(path), "save the adapter again with PEFT's save_pretrained"
    text = _read_bytes(path)
    if text.startswith(LFS_POINTER):
        raise AdapterError(
            where, found="a Git LFS pointer", expected="the file itself", remedy="run `git lfs pull` in its repository"
        )
    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterError(
            where, found=f"more than {MAX_CONFIG_BYTES} bytes", expected="a file of some kilobytes", remedy=remedy
        )
    try:
        config = json.loads(text, object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as error:
        found = f"no valid JSON ({error})" if text else "an empty file"
        raise AdapterError(where, found=found, expected="a JSON object", remedy=remedy) from error
    if not isinstance(config, dict):
        raise AdapterError(where, found=f"the JSON value {short(config)}", expected="a JSON object", remedy=remedy)
    return config


def _read_bytes(path: Path) -> bytes:
    """At most one byte more than the limit; opened once and checked by descriptor, so that no pipe can block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterError(
            str(path),
            found=f"nothing readable ({error.strerror})",
            expected="the configuration of a PEFT adapter",
            remedy="give the folder that PEFT's save_pretrained wrote",
        ) from error
    raise AdapterError(
        str(path),
        found="a pipe, a device or a folder",
        expected="a plain file",
        remedy="give the folder that PEFT's save_pretrained wrote",
    )


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    merged = dict(pairs)
    if len(merged) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return merged


def parse_config(raw: Mapping[str, object], source: str) -> tuple[AdapterConfig, list[str]]:
    """Check a configuration, field by field.

    Returns:
        The honoured fields, and notes on what is served but worth saying.

    Raises:
        AdapterError: names the first field with a value that is wrong or cannot be honoured.
    """
    config, problems = check_config(raw, source)
    if config is None or problems:
        raise problems[0]
    return config, _notes(config)


def check_config(raw: Mapping[str, object], source: str) -> tuple[AdapterConfig | None, list[AdapterError]]:
    """The honoured fields (None if one has a wrong value), and every problem of the configuration."""
    kept = {name: value for name, value in raw.items() if name not in REFUSED and name not in HARMLESS}
    problems: list[AdapterError] = []
    config = None
    try:
        config = AdapterConfig.model_validate(kept)
    except ValidationError as error:
        problems += _validation_errors(error, kept, source)
    problems += _unserved(raw, source)
    if config is not None:
        for check in (_check_init, _check_layers, _check_blocks):
            try:
                check(config, source)
            except AdapterError as error:
                problems.append(error)
    return config, problems


def _validation_errors(error: ValidationError, raw: Mapping[str, object], source: str) -> list[AdapterError]:
    """One for each field, with the value found and what the field may hold."""
    found: dict[str, AdapterError] = {}
    for details in error.errors(include_url=False):
        # The first part of a location is a field; below `use_bdlora` the second is one, elsewhere an index or a type.
        name, *below = (str(part) for part in details["loc"])
        fields, holder = AdapterConfig.model_fields, raw
        path, block = name, raw.get(name)
        if name == "use_bdlora" and below and isinstance(block, Mapping):
            fields, holder, path, name = BlockDiagonalConfig.model_fields, block, f"{name}.{below[0]}", below[0]
        problem = config_error(
            source,
            path,
            found=short(holder[name]) if name in holder else "nothing",
            expected=fields[name].description or "another type",
            remedy="write it as PEFT's LoraConfig saves it",
        )
        problem.__cause__ = error
        found.setdefault(path, problem)
    return list(found.values())


def _unserved(raw: Mapping[str, object], source: str) -> list[AdapterError]:
    return [
        config_error(
            source,
            name,
            found=f"{short(raw[name])} ({refusal.meaning})",
            expected=short(refusal.off[-1]),
            remedy=refusal.remedy,
        )
        for name, refusal in REFUSED.items()
        if name in raw and raw[name] not in refusal.off
    ]


def _check_init(config: AdapterConfig, source: str) -> None:
    """Refuse the methods that change the base weights, and those not known to leave them alone."""
    init = config.init_lora_weights
    if not isinstance(init, str) or init.lower() in _BASE_KEEPING_INITS:
        return
    convert = (
        "save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it LoRA"
    )
    remedy = convert if init.lower().startswith(_CONVERTIBLE_INITS) else "train again with init_lora_weights=True"
    raise config_error(
        source,
        "init_lora_weights",
        found=f"{short(init)} (not known to leave the base weights as they are)",
        expected=f"true, false or one of {', '.join(sorted(_BASE_KEEPING_INITS))}",
        remedy=remedy,
    )


def _check_layers(config: AdapterConfig, source: str) -> None:
    """What PEFT demands of target_modules and the fields that choose layers."""
    for name, value in (
        ("layers_to_transform", config.layers_to_transform),
        ("layers_pattern", config.layers_pattern),
    ):
        if isinstance(config.target_modules, str) and value is not None:
            raise config_error(
                source,
                name,
                found=f"{short(value)} beside the expression target_modules={short(config.target_modules)}",
                expected="null",
                remedy="choose the layers inside the expression",
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise config_error(
            source,
            "layers_pattern",
            found=f"{short(config.layers_pattern)} without layers_to_transform",
            expected="both or none",
            remedy="give layers_to_transform or write null",
        )


def _check_blocks(config: AdapterConfig, source: str) -> None:
    blocks = config.use_bdlora
    both = set(blocks.target_modules_bd_a or ()) & set(blocks.target_modules_bd_b or ()) if blocks else set()
    if both:
        raise config_error(
            source,
            "use_bdlora",
            found=f"{', '.join(map(short, sorted(both)))} in target_modules_bd_a and in target_modules_bd_b",
            expected="each name in one of the lists",
            remedy="name row-parallel layers (o_proj, down_proj) in target_modules_bd_a and the others in "
            "target_modules_bd_b, as the adapter was trained",
        )


def _notes(config: AdapterConfig) -> list[str]:
    notes = []
    unknown = {name: value for name, value in (config.model_extra or {}).items() if _says_something(value)}
    if config.use_bdlora:
        extra = config.use_bdlora.model_extra or {}
        unknown |= {f"use_bdlora.{name}": value for name, value in extra.items() if _says_something(value)}
    if unknown:
        listed = some(f"{name}={short(value)}" for name, value in unknown.items())
        notes.append(f"fields of adapter_config that PEFT 0.21.2 does not know are ignored: {listed}")
    if config.revision not in (None, "", "main"):
        notes.append(f"trained on revision {short(config.revision)} of its base model, which is not checked")
    if "lora_alpha" not in config.model_fields_set:
        notes.append(f"adapter_config has no lora_alpha: PEFT's default {config.lora_alpha:g} is used")
    return notes


def _says_something(value: object) -> bool:
    return value not in (None, False, "", [], {}) and not (isinstance(value, float) and math.isnan(value))
