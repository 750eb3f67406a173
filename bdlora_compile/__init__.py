"""Serve one Llama with many LoRA adapters on many GPUs, through ``torch.compile``.

model, adapters = bdlora_compile.load("path/or/hub-id", adapters={"math": "adapters/math"})
model.compile(backend="bdlora")
with adapters.use(["math", None]):
    model.generate(**batch)
"""

from bdlora_compile.declared import declare_block_diagonal, declare_replicated
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
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.runtime.cache import LocalCache
from bdlora_compile.version import __version__

__all__ = [
    "AdapterError",
    "AdapterSet",
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
    "declare_block_diagonal",
    "declare_replicated",
    "load",
    "make_cache",
    "reports",
]
