"""Read and check one PEFT LoRA adapter, from its folder or from memory; nothing is served that was not checked here.

Legend: D/O in/out features, R rank, G blocks of a block-diagonal factor.  y = W x + scaling B (A x).

    kind      A            B
    DENSE     [R, D]       [O, R]
    BLOCK_A   [R, D/G]     [O, R]       packed: block g of the dense A is rows [g R/G, (g+1) R/G), columns of D/G
    BLOCK_B   [R, D]       [O, R/G]     packed: block g of the dense B is rows [g O/G, (g+1) O/G), columns of R/G

The tensors decide which sites carry LoRA and the configuration says how; the two must agree tensor by tensor. Values
are read later, and whoever copies them checks that they are finite.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType

import torch

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_agreement import BaseName, check_pair, pair_factors
from bdlora_compile.runtime.adapter_config import parse_config, read_config
from bdlora_compile.runtime.adapter_targets import FactorKind, plan_sites
from bdlora_compile.runtime.adapter_tensors import TensorSource, check_finite, memory_tensors
from bdlora_compile.runtime.adapter_weights import WeightsFile, find_weights
from bdlora_compile.sites import Site

__all__ = [
    "Adapter",
    "FactorKind",
    "LoraFactors",
    "TensorSource",
    "adapter_from_tensors",
    "read_adapter",
]


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The two factors of one site.

    Attributes:
        site: name of the site.
        kind: which factor is packed.
        rank: R, also where a factor is packed.
        nblocks: G; 1 for ``FactorKind.DENSE``.
        scaling: what multiplies B A.
        a: [R, D], or packed [R, D/G].
        b: [O, R], or packed [O, R/G].
    """

    site: str
    kind: FactorKind
    rank: int
    nblocks: int
    scaling: float
    a: TensorSource
    b: TensorSource


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked adapter, whose values are still where they were.

    Attributes:
        source: what messages call it: its folder, or a name.
        factors: by site name, in the order of the model's sites; never empty.
        notes: what is served but worth saying.
    """

    source: str
    factors: Mapping[str, LoraFactors]
    notes: tuple[str, ...] = ()
    _file: WeightsFile | None = field(default=None, repr=False, compare=False)

    @property
    def max_rank(self) -> int:
        """The largest R of its sites."""
        return max(factors.rank for factors in self.factors.values())

    @property
    def folder(self) -> Path | None:
        """Where it was read from; None for an adapter in memory."""
        return None if self._file is None else self._file.path.parent

    def opened(self) -> AbstractContextManager[object]:
        """Keep the file open around many views, which saves opening it for each. Let them all go before the end.

        Raises:
            AdapterError: the file changed since it was checked, or while it was read.
        """
        return nullcontext() if self._file is None else self._file.opened()

    def check_finite(self) -> None:
        """Look at all values.

        Raises:
            AdapterError: one is NaN or infinite, or the file changed since it was checked.
        """
        with self.opened():
            for factors in self.factors.values():
                check_finite(factors.a)
                check_finite(factors.b)


def read_adapter(path: str | Path, sites: Mapping[str, Site], *, base_model: str | None = None) -> Adapter:
    """Read and check the adapter in a folder that PEFT's ``save_pretrained`` wrote.

    Args:
        path: the folder, with ``adapter_config.json`` and ``adapter_model.safetensors``.
        sites: the layers of the served model that can carry LoRA, by name.
        base_model: name or path of the served model, to be compared with the one the adapter names.

    Raises:
        AdapterError: a file is missing or damaged, a field cannot be honoured, or tensors, fields and sites disagree.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(
            str(folder),
            found="a file" if folder.exists() else "nothing",
            expected="a folder with adapter_config.json and adapter_model.safetensors",
            remedy="give the folder that PEFT's save_pretrained wrote",
        )
    config = read_config(folder / "adapter_config.json")
    file = find_weights(folder)
    return _assemble(config, file.tensors(), sites, str(folder), base_model, file)


def adapter_from_tensors(
    config: Mapping[str, object],
    tensors: Mapping[str, torch.Tensor],
    sites: Mapping[str, Site],
    *,
    source: str,
    base_model: str | None = None,
) -> Adapter:
    """Check an adapter in memory: ``peft_config.to_dict()`` and ``get_peft_model_state_dict(model)`` of PEFT.

    Args:
        config: fields of ``LoraConfig``; sets, enumerations and nested dataclasses are taken as PEFT would save them.
        tensors: by the names of the file format. They are not copied: a later read sees later values.
        sites: the layers of the served model that can carry LoRA, by name.
        source: what messages call the adapter.
        base_model: name or path of the served model, to be compared with the one the adapter names.

    Raises:
        AdapterError: a field cannot be honoured, or tensors, fields and sites disagree.
    """
    plain = {name: _as_saved(value) for name, value in config.items()}
    return _assemble(plain, memory_tensors(tensors, source), sites, source, base_model, None)


def _as_saved(value: object) -> object:
    """A field of a configuration in memory, as it would be read back from a file."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.value if isinstance(value, Enum) else value


def _assemble(
    raw: Mapping[str, object],
    tensors: Mapping[str, TensorSource],
    sites: Mapping[str, Site],
    source: str,
    base_model: str | None,
    file: WeightsFile | None,
) -> Adapter:
    config, notes = parse_config(raw, source)
    base = BaseName(config.base_model_name_or_path, base_model)
    plans, plan_notes = plan_sites(config, sites, source)
    pairs, pair_notes = pair_factors(tensors, plans, sites, source, base)
    factors = {}
    for name, (a, b) in pairs.items():
        plan = plans[name]
        check_pair(sites[name], plan, a, b, source, base)
        factors[name] = LoraFactors(name, plan.kind, plan.rank, plan.nblocks, plan.scaling, a, b)
    all_notes = (*notes, *plan_notes, *pair_notes, *base.notes())
    return Adapter(source, MappingProxyType(factors), all_notes, file)
