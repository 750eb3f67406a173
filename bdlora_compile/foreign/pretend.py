"""A process that plays one rank of several that are not there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from bdlora_compile.errors import ConfigError


@contextmanager
def pretend_ranks(tp_size: int, rank: int = 0) -> Iterator[None]:
    """This process is ``rank`` of ``tp_size`` ranks that are not there: collectives return at once, with anything.

    Inside, a model can be sharded (by ``parallelize_module``, by Hugging Face) and given to `explain`.

    Raises:
        ConfigError: this process has a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the "fake" backend

    if dist.is_initialized():
        raise ConfigError(
            "pretend_ranks",
            found="a process group",
            expected="a process without one",
            remedy="leave it out: explain takes the ranks that are there",
        )
    dist.init_process_group("fake", rank=rank, world_size=tp_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
