"""The passes, in order. This is the one place where the order is written."""

from bdlora_compile.pass_manager import GraphPass
from bdlora_compile.passes.canonicalize import Canonicalize
from bdlora_compile.passes.check_roles import CheckRoles
from bdlora_compile.passes.deduplicate import Deduplicate
from bdlora_compile.passes.drop_lora import DropLora
from bdlora_compile.passes.fold import Fold
from bdlora_compile.passes.fuse import Fuse
from bdlora_compile.passes.localize import LocalizeLora
from bdlora_compile.passes.merge import Merge
from bdlora_compile.passes.partition import Partition
from bdlora_compile.passes.tag import Tag

PIPELINE: tuple[GraphPass, ...] = (
    Canonicalize(),
    Tag(),
    Deduplicate(),
    CheckRoles(),
    Partition(),
    LocalizeLora(),
    Fold(),
    Merge(),
    Fuse(),
)

BASE_ONLY: tuple[GraphPass, ...] = (DropLora(),)
"""What a copy of the finished graph goes through for batches without adapters."""
