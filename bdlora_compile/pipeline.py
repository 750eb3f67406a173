"""The passes, in order. This is the one place where the order is written."""

from bdlora_compile.pass_manager import GraphPass
from bdlora_compile.passes.canonicalize import Canonicalize
from bdlora_compile.passes.fold import Fold
from bdlora_compile.passes.fuse import Fuse
from bdlora_compile.passes.localize import LocalizeLora
from bdlora_compile.passes.merge import Merge
from bdlora_compile.passes.partition import Partition
from bdlora_compile.passes.tag import Tag

PIPELINE: tuple[GraphPass, ...] = (
    Canonicalize(),
    Tag(),
    Partition(),
    LocalizeLora(),
    Fold(),
    Merge(),
    Fuse(),
)
