"""Serve one Llama with many LoRA adapters on many GPUs, through ``torch.compile``.

model, adapters = bdlora_compile.load("path/or/hub-id", adapters={"math": "adapters/math"})
model.compile(backend="bdlora")
with adapters.use(["math", None]):
    model.generate(**batch)
"""

from bdlora_compile.errors import (
    AdapterError,
    AgreementError,
    BdloraError,
    ConfigError,
    HollowError,
    PassError,
    PlacementError,
)
from bdlora_compile.model import Ranks, attach, load, make_cache, reports
from bdlora_compile.report import Report
from bdlora_compile.runtime.adapter_roots import AdapterRoots
from bdlora_compile.runtime.adapter_stats import AdapterStats
from bdlora_compile.runtime.adapter_version import AdapterInfo
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.runtime.cache import LocalCache
from bdlora_compile.version import __version__

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "AdapterRoots",
    "AdapterSet",
    "AdapterStats",
    "AgreementError",
    "BdloraError",
    "ConfigError",
    "HollowError",
    "LocalCache",
    "PassError",
    "PlacementError",
    "Ranks",
    "Report",
    "__version__",
    "attach",
    "load",
    "make_cache",
    "reports",
]
