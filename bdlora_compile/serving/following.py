"""Rank 0 drives, the others follow: a program for one process serves a model on many ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from bdlora_compile.runtime.adapters import AdapterSet


@contextmanager
def follow(model: Any, adapters: AdapterSet, timeout: timedelta = timedelta(seconds=30)) -> Iterator[bool]:
    """Inside the block rank 0 uses the model and its adapters as if there were no other ranks.

    Every rank enters it after `load` and ``compile``. The block begins at once on rank 0, with True. On the other
    ranks it begins when rank 0 has left its own, with False: until then they repeat the forwards and changes of
    adapters that rank 0 makes. With one rank there is nothing to follow, and the block begins with True::

        with bdlora_compile.follow(model, adapters) as drives:
            if drives:
                serve(model, adapters)

    Args:
        model, adapters: from `bdlora_compile.load` or `attach`.
        timeout: after which a rank that says nothing counts as lost.

    Raises:
        LostRankError: a rank died, hangs, or failed alone. On rank 0 in the call that noticed; on others from here.
    """
    raise NotImplementedError
    yield True
