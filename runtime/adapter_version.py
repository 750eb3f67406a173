"""The contents of an adapter, told apart by a digest: what a name stands for at one time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bdlora_compile.runtime.adapter_file import Adapter, LoraFactors
from bdlora_compile.runtime.bank import StagedAdapter
from bdlora_compile.runtime.hashing import sha256_of


@dataclass(slots=True, eq=False)
class Version:
    """One content of one name. A name that is loaded again with other contents is another version.

    Attributes:
        name: the adapter's name.
        digest: of its content, the same on all ranks and in all processes (`content_digest`).
        rank: its largest rank R.
        elements: room it takes in the pool, on the fullest rank.
        notes: things about it that are served but worth knowing.
        source: where its values are read again: the folder, or the adapter in memory.
        fingerprints: of what each hosted rank staged, to be found again by a later reading.
        staged: for each hosted rank the copy in host memory, None while there is none.
        slot: where it is resident, None while it is not.
        references: `use` blocks that are open on it.
        pinned: whether it is kept resident.
        last_used: number of the last call that used it; the smallest is evicted first.
        is_current: whether the name still stands for it.
    """

    name: str
    digest: str
    rank: int
    elements: int
    notes: Sequence[str]
    source: Path | Adapter
    fingerprints: Sequence[str]
    staged: Sequence[StagedAdapter] | None
    slot: int | None = None
    references: int = 0
    pinned: bool = False
    last_used: int = 0
    is_current: bool = True

    @property
    def can_be_evicted(self) -> bool:
        """Whether it is resident and nobody needs it to be."""
        return self.slot is not None and not self.references and not self.pinned


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter as it is at the moment.

    Attributes:
        name: its name.
        version: digest of its contents, see `AdapterSet.version`.
        rank: its largest rank R.
        notes: things about it that are served but worth knowing.
        nbytes: what it takes of the pool, on the fullest rank.
        is_resident: whether it is in the device's pool.
        is_pinned: whether it stays there.
        references: `use` blocks that are open on it.
    """

    name: str
    version: str
    rank: int
    notes: Sequence[str]
    nbytes: int
    is_resident: bool
    is_pinned: bool
    references: int

    @classmethod
    def of(cls, version: "Version", element_size: int) -> "AdapterInfo":
        """What there is to say of a version now; ``element_size`` in bytes."""
        return cls(
            version.name,
            version.digest,
            version.rank,
            version.notes,
            version.elements * element_size,
            version.slot is not None,
            version.pinned,
            version.references,
        )


def content_digest(adapter: Adapter) -> str:
    """SHA-256 of all factors and of what the configuration makes of them, in the order of the model's sites.

    Names, training settings and the order of tensors in the file do not count; the stored type does. Reads the whole
    adapter once.

    Raises:
        AdapterError: the file changed since it was checked.
    """
    with adapter.opened():
        return sha256_of([[_facts(site), site.a.view(), site.b.view()] for site in adapter.factors.values()])


def _facts(factors: LoraFactors) -> bytes:
    """What decides, besides values, what a site computes."""
    facts = [factors.site, factors.kind.value, factors.rank, factors.nblocks, float(factors.scaling).hex()]
    return json.dumps([facts, [[str(one.dtype), list(one.shape)] for one in (factors.a, factors.b)]]).encode()
