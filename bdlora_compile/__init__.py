"""Serve one Llama with many LoRA adapters on many GPUs, through ``torch.compile``.

model, adapters = bdlora_compile.load("path/or/hub-id", adapters={"math": "adapters/math"})
model.compile(backend="bdlora")
with adapters.use(["math", None]):
    model.generate(**batch)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bdlora_compile.version import __version__

if TYPE_CHECKING:
    from bdlora_compile.declared import declare_block_diagonal, declare_replicated
    from bdlora_compile.errors import (
        AdapterError,
        AgreementError,
        BdloraError,
        ConfigError,
        EngineClosedError,
        HollowError,
        LostRankError,
        PassError,
        PlacementError,
        QueueFullError,
        RequestError,
        UnknownAdapterError,
    )
    from bdlora_compile.explaining import Load, explain
    from bdlora_compile.explanation import Explanation
    from bdlora_compile.foreign.pretend import pretend_ranks
    from bdlora_compile.machine import Machine
    from bdlora_compile.model import attach, load, make_cache, release_graphs, reports
    from bdlora_compile.ranks import Ranks
    from bdlora_compile.report import Report
    from bdlora_compile.runtime.adapter_roots import AdapterRoots
    from bdlora_compile.runtime.adapter_stats import AdapterStats
    from bdlora_compile.runtime.adapter_version import AdapterInfo
    from bdlora_compile.runtime.adapters import AdapterSet
    from bdlora_compile.runtime.cache import LocalCache
    from bdlora_compile.serving.following import follow
    from bdlora_compile.strategy import Decision
    from bdlora_compile.timing import Workload

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "AdapterRoots",
    "AdapterSet",
    "AdapterStats",
    "AgreementError",
    "BdloraError",
    "ConfigError",
    "Decision",
    "EngineClosedError",
    "Explanation",
    "HollowError",
    "Load",
    "LocalCache",
    "LostRankError",
    "Machine",
    "PassError",
    "PlacementError",
    "QueueFullError",
    "Ranks",
    "Report",
    "RequestError",
    "UnknownAdapterError",
    "Workload",
    "__version__",
    "attach",
    "declare_block_diagonal",
    "declare_replicated",
    "explain",
    "follow",
    "load",
    "make_cache",
    "pretend_ranks",
    "release_graphs",
    "reports",
]

_HOMES = {
    "declared": ("declare_block_diagonal", "declare_replicated"),
    "errors": (
        "AdapterError",
        "AgreementError",
        "BdloraError",
        "ConfigError",
        "EngineClosedError",
        "HollowError",
        "LostRankError",
        "PassError",
        "PlacementError",
        "QueueFullError",
        "RequestError",
        "UnknownAdapterError",
    ),
    "explaining": ("Load", "explain"),
    "explanation": ("Explanation",),
    "foreign.pretend": ("pretend_ranks",),
    "machine": ("Machine",),
    "model": ("attach", "load", "make_cache", "release_graphs", "reports"),
    "ranks": ("Ranks",),
    "report": ("Report",),
    "runtime.adapter_roots": ("AdapterRoots",),
    "runtime.adapter_stats": ("AdapterStats",),
    "runtime.adapter_version": ("AdapterInfo",),
    "runtime.adapters": ("AdapterSet",),
    "runtime.cache": ("LocalCache",),
    "serving.following": ("follow",),
    "strategy": ("Decision",),
    "timing": ("Workload",),
}
"""The module of each public name; torch is imported with the first one that is used."""


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bdlora_compile.{home}"), name)
    raise AttributeError(f"module 'bdlora_compile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
