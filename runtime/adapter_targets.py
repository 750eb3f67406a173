"""What ``adapter_config.json`` says of each site: whether it carries LoRA, its rank, its scaling and its block kind.

The matching rules are PEFT's (``check_target_module_exists``, ``get_pattern_key`` and ``BdLoraLinearVariant``), written
again because PEFT is no dependency at run time; tests compare them with the installed PEFT.
"""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import regex  # type: ignore[import-untyped]

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_config import AdapterConfig
from bdlora_compile.runtime.adapter_fields import config_error, short, some
from bdlora_compile.sites import Role, Site

ALL_LINEAR: Final = "all-linear"
VOCABULARY_NAMES: Final = frozenset({"lm_head", "embed_tokens"})
"""PEFT's names of the layer that makes logits and of the embedding. "all-linear" leaves both out."""
_PATTERN_SECONDS: Final = 10.0
"""For all sites and one field; the largest honest case, 560 plain keys on the 560 sites of 80 layers, takes 0.2 s."""
_NO_REPEATS: Final = re.compile(r"[\w.\\^$-]*")
"""Keys that are names, or nearly: without a repeat or a choice their time is linear."""
_TWO_MEANINGS: Final = re.compile(r"\[\^?\[|\{(?!\d*,?\d*\})")
"""[[:alpha:]] is a class and {e} allows an error in `regex`, while `re` takes both as characters."""
_MAX_PATTERN_CHARS: Final = 2_000
_MAX_REPEATS: Final = 10_000
"""Counted repeats are unrolled by the compiler of patterns: (?:(?:a{1000}){1000}){10} took it 14 s."""


class FactorKind(Enum):
    """Which factor of a site is stored packed block-diagonal."""

    DENSE = "dense"
    """None: ordinary LoRA."""
    BLOCK_A = "block_a"
    """A is packed, [R, D/G]; lines up with tensor parallelism at a row site."""
    BLOCK_B = "block_b"
    """B is packed, [O, R/G]; lines up with tensor parallelism at a column site."""


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What the configuration says of a site that it targets.

    Attributes:
        rank: R, also where a factor is packed.
        scaling: alpha / R, or alpha / sqrt(R) with use_rslora.
        kind: which factor is packed.
        nblocks: G, 1 for ``FactorKind.DENSE``.
    """

    rank: int
    scaling: float
    kind: FactorKind
    nblocks: int

    def shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """Stored shapes of A and B; the blocks are taken to divide what they split."""
        a_blocks = self.nblocks if self.kind is FactorKind.BLOCK_A else 1
        b_blocks = self.nblocks if self.kind is FactorKind.BLOCK_B else 1
        return (self.rank, site.in_features // a_blocks), (site.out_features, self.rank // b_blocks)


def plan_sites(config: AdapterConfig, sites: Mapping[str, Site], source: str) -> tuple[dict[str, SitePlan], list[str]]:
    """Apply the configuration to all sites.

    Returns:
        A plan for each targeted site, in the order of ``sites``; notes on what is served but worth saying.

    Raises:
        AdapterError: a pattern is no regular expression or takes too long, nothing is targeted by intent, or
            use_bdlora demands two things of one site.
    """
    is_target = _target_rule(config, source)
    targets = _with_tied([name for name in sites if is_target(name)], config, sites)
    ranks = _PatternValues(config.rank_pattern or {}, config.r, "rank_pattern", source)
    alphas = _PatternValues(config.alpha_pattern or {}, config.lora_alpha, "alpha_pattern", source)
    plans = {}
    for name in targets:
        rank, alpha = int(ranks.value(name)), alphas.value(name)
        kind, nblocks = _block_kind(config, sites[name], source)
        scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        plans[name] = SitePlan(rank, scaling, kind, nblocks)
    notes = _target_notes(config, sites) + ranks.notes() + alphas.notes() + _block_notes(config, plans, sites)
    return plans, notes


@dataclass(frozen=True, slots=True)
class _Hit:
    key: str
    groups: Mapping[str, str | None]


class _Patterns:
    """Regular expressions of one field, matched in order and within a time limit.

    The expressions come from a file that need not be trusted, and some take exponential time. PEFT's own engine, `re`,
    has no time limit: it judges what is valid and matches what cannot repeat, `regex` matches the rest. Both engines
    agree on valid expressions; `re` takes a tenth of the time, which counts where each site has a key of its own.
    """

    def __init__(self, keys: Iterable[str], form: str, field: str, source: str, *, whole: bool = False) -> None:
        """``form`` is the whole expression with ``{key}`` in it; ``whole`` demands a match up to the end of a name."""
        self._field, self._source, self._whole = field, source, whole
        self._matchers = [(key, self._compile(form.replace("{key}", key), key)) for key in keys]
        self._deadline = time.monotonic() + _PATTERN_SECONDS

    def hits(self, name: str) -> Iterator[_Hit]:
        """The keys that match a site, in the order of the file."""
        for key, matcher in self._matchers:
            try:
                found = matcher(name)
            except TimeoutError as error:
                raise self._error(key, f"an expression that took more than {_PATTERN_SECONDS:g} s") from error
            if found:
                yield _Hit(key, found.groupdict())

    def _compile(self, expression: str, key: str) -> "Callable[[str], re.Match[str] | None]":
        counts = [int(count) for count in re.findall(r"(?<=[{,])\d+(?=[,}])", key)]
        if _TWO_MEANINGS.search(key):
            raise self._error(key, "an expression that engines read in different ways")
        if len(key) > _MAX_PATTERN_CHARS or math.prod(max(count, 1) for count in counts) > _MAX_REPEATS:
            raise self._error(key, "an expression too large to be safe")
        try:
            with warnings.catch_warnings():
                # A warning here is of a set whose meaning will change, which `regex` may read the new way.
                warnings.simplefilter("error", FutureWarning)
                plain = re.compile(expression)
            if _NO_REPEATS.fullmatch(key):
                return plain.fullmatch if self._whole else plain.match
            pattern = regex.compile(expression)
        except (re.error, regex.error, RecursionError, OverflowError, FutureWarning) as error:
            raise self._error(key, f"no valid regular expression ({error})") from error
        timed = pattern.fullmatch if self._whole else pattern.match
        return lambda name: timed(name, timeout=max(self._deadline - time.monotonic(), 1e-3))

    def _error(self, key: str, found: str) -> AdapterError:
        return config_error(
            self._source,
            self._field,
            found=f"{short(key)}, {found}",
            expected="a simple regular expression for module names",
            remedy="write the module names instead",
        )


class _PatternValues:
    """Values that a pattern field gives to sites, and a default for the others; the first key that matches wins."""

    def __init__(self, values: Mapping[str, float], default: float, field: str, source: str) -> None:
        self._values, self._default, self._field = values, default, field
        self._patterns = _Patterns(values, r"(.*\.)?({key})$", field, source)
        self._used: set[str] = set()
        self._ambiguous: list[str] = []

    def value(self, name: str) -> float:
        keys = [hit.key for hit in self._patterns.hits(name)]
        self._used.update(keys)
        if len({self._values[key] for key in keys}) > 1:
            self._ambiguous.append(name)
        return self._values[keys[0]] if keys else self._default

    def notes(self) -> list[str]:
        """Notes on the sites asked for so far."""
        notes = []
        unused = [short(key) for key in self._values if key not in self._used]
        if unused:
            notes.append(f"{self._field} has keys that match no targeted site: {some(unused)}")
        if self._ambiguous:
            # PEFT writes the file with sorted names, so that training may have seen the keys in another order.
            notes.append(
                f"{self._field} has several keys with different values for {len(self._ambiguous)} sites (for example "
                f"{self._ambiguous[0]}): the first in the file is used, as in PEFT, which sorts them when it saves"
            )
        return notes


def _target_rule(config: AdapterConfig, source: str) -> Callable[[str], bool]:
    included = _include_rule(config, source)
    excluded = _name_rule(config.exclude_modules, "exclude_modules", source)
    return lambda name: included(name) and not excluded(name)


def _with_tied(targets: list[str], config: AdapterConfig, sites: Mapping[str, Site]) -> list[str]:
    """With ensure_weight_tying PEFT gives both ends of a tied vocabulary LoRA where one of them is targeted."""
    vocabulary = [site for site in sites.values() if site.vocabulary]
    is_tied = len({site.weight for site in vocabulary}) < len(vocabulary)
    if not (config.ensure_weight_tying and is_tied and any(site.name in targets for site in vocabulary)):
        return targets
    return [name for name in sites if name in targets or sites[name].vocabulary]


def _include_rule(config: AdapterConfig, source: str) -> Callable[[str], bool]:
    target = config.target_modules
    if not target:
        raise config_error(
            source,
            "target_modules",
            found=short(target),
            expected="names of modules, a regular expression or 'all-linear'",
            remedy="name the modules the adapter was trained on (PEFT's default for Llama is q_proj and v_proj)",
        )
    if isinstance(target, str):
        if target.lower() == ALL_LINEAR:
            return lambda name: name.rpartition(".")[2] not in VOCABULARY_NAMES
        return _name_rule(target, "target_modules", source)
    in_layers = _layer_rule(config, source)
    exact, by_end = frozenset(target), _name_rule(target, "target_modules", source)
    # As in PEFT a module that is named in full is targeted whatever its layer.
    return lambda name: name in exact or (by_end(name) and in_layers(name))


def _name_rule(names: list[str] | str | None, field: str, source: str) -> Callable[[str], bool]:
    """A list matches whole names and ends of names after a dot; a string is an expression for whole names."""
    if not names:
        return lambda name: False
    if isinstance(names, str):
        patterns = _Patterns([names], "{key}", field, source, whole=True)
        return lambda name: any(True for _ in patterns.hits(name))
    return names_or_ends(names)


def names_or_ends(names: Iterable[str]) -> Callable[[str], bool]:
    """Matches whole names, and ends of names after a dot: what PEFT does with a list."""
    exact = frozenset(names)
    ends = tuple(f".{end}" for end in exact)
    return lambda name: name in exact or name.endswith(ends)


def _layer_rule(config: AdapterConfig, source: str) -> Callable[[str], bool]:
    """Whether the first numbered part of a name is among layers_to_transform."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return lambda name: True
    layers = frozenset([wanted] if isinstance(wanted, int) else wanted)
    containers = config.layers_pattern or []
    if isinstance(containers, str):
        containers = [containers]
    form = r"(?:^|.*?\.){key}\.(?P<idx>\d+)\." if containers else r".*?\.[^.]*\.(?P<idx>\d+)\."
    patterns = _Patterns(containers or [""], form, "layers_pattern", source)

    def in_layers(name: str) -> bool:
        hit = next(patterns.hits(name), None)
        layer = hit.groups["idx"] if hit else None
        return layer is not None and int(layer) in layers

    return in_layers


def _block_kind(config: AdapterConfig, site: Site, source: str) -> tuple[FactorKind, int]:
    """Which factor of a targeted site is packed, and its number of blocks."""
    blocks, name = config.use_bdlora, site.name
    if blocks is None:
        return FactorKind.DENSE, 1
    if site.is_lookup:
        raise config_error(
            source,
            "use_bdlora",
            found=f"the embedding {name} among the targeted modules",
            expected="linear layers alone: PEFT has no block-diagonal LoRA for embeddings, not even with match_strict "
            "false",
            remedy="train an adapter of ordinary LoRA for the embedding",
        )
    in_a = any(part in name for part in blocks.target_modules_bd_a or ())
    in_b = any(part in name for part in blocks.target_modules_bd_b or ())
    if in_a and in_b:
        raise config_error(
            source,
            "use_bdlora",
            found=f"{name} in target_modules_bd_a and in target_modules_bd_b (they match parts of names)",
            expected="each targeted module in one of the lists",
            remedy="write longer names, that match as the adapter was trained",
        )
    if blocks.match_strict and not in_a and not in_b:
        raise config_error(
            source,
            "use_bdlora",
            found=f"{name} in neither of target_modules_bd_a and target_modules_bd_b, with match_strict",
            expected="each targeted module in one of the lists",
            remedy="set match_strict to false if this module carries an ordinary LoRA",
        )
    if blocks.nblocks == 1 or not (in_a or in_b):
        return FactorKind.DENSE, 1
    return (FactorKind.BLOCK_A if in_a else FactorKind.BLOCK_B), blocks.nblocks


def _target_notes(config: AdapterConfig, sites: Mapping[str, Site]) -> list[str]:
    if not isinstance(config.target_modules, list):
        return []
    idle = [end for end in config.target_modules if end not in sites and not _any_ends(sites, f".{end}")]
    return [f"target_modules names what no site matches: {some(map(short, idle))}"] if idle else []


def _any_ends(names: Iterable[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)


def _block_notes(config: AdapterConfig, plans: Mapping[str, SitePlan], sites: Mapping[str, Site]) -> list[str]:
    """Notes on block factors that bring nothing: one block, or blocks on the wrong side for tensor parallelism."""
    if config.use_bdlora and config.use_bdlora.nblocks == 1:
        return ["use_bdlora has nblocks=1: it is served as the ordinary LoRA that it is"]
    across = {Role.COLUMN: FactorKind.BLOCK_A, Role.ROW: FactorKind.BLOCK_B}
    swapped = [name for name, plan in plans.items() if plan.kind is across[sites[name].role]]
    if not swapped:
        return []
    lists = [
        f"{' and '.join(sorted(ends))} in {field}"
        for field, role in (("target_modules_bd_a", Role.ROW), ("target_modules_bd_b", Role.COLUMN))
        if (ends := {name.rpartition(".")[2] for name in swapped if sites[name].role is role})
    ]
    return [
        f"{len(swapped)} sites (for example {swapped[0]}) are served as ordinary LoRA, right but slower: their blocks "
        f"do not line up with tensor parallelism. To use the blocks, train with {', and '.join(lists)}"
    ]
