"""The ranks that share a model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from bdlora_compile.errors import ConfigError
from bdlora_compile.placement import Mesh
from bdlora_compile.runtime.agreement import DEFAULT_TIMEOUT, SETUP_TIMEOUT, Agreement, Alone, StoreAgreement


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that share a model, and those that this process hosts.

    Attributes:
        mesh: all ranks.
        hosted: ranks of this process: one, or all for the lock-step interpreter.
        agreement: how the ranks compare notes.
    """

    mesh: Mesh
    hosted: Sequence[int]
    agreement: Agreement

    @classmethod
    def of_process_group(
        cls, timeout: timedelta = DEFAULT_TIMEOUT, setup_timeout: timedelta = SETUP_TIMEOUT
    ) -> "Ranks":
        """The default process group, or this process alone if there is none.

        Args:
            timeout: how long ranks wait for one another when adapters change and at the start of `generate`. A rank
                that died is noticed after that time, 25 s by default, plus at most 5 s.
            setup_timeout: the same while the model is loaded and after a compilation, 120 s by default.

        Raises:
            ConfigError: torchrun started several processes, and they have no process group.
        """
        if not dist.is_available() or not dist.is_initialized():
            _refuse_many_alone()
            return cls(Mesh(1), [0], Alone())
        size, rank = dist.get_world_size(), dist.get_rank()
        mesh = Mesh(size, _world_name())
        if size == 1 or dist.get_backend() == "fake":
            return cls(mesh, [rank], Alone())
        store = dist.distributed_c10d._get_default_store()
        # Every rank makes its models in the same order: the count names this one on all of them.
        number = store.add(f"bdlora/models/{rank}", 1)
        store = PrefixStore(f"bdlora/{number}", store)
        return cls(mesh, [rank], StoreAgreement(store, rank, size, timeout, setup_timeout))

    @classmethod
    def lockstep(cls, size: int) -> "Ranks":
        """All of ``size`` ranks in this process, for tests and for looking at things."""
        return cls(Mesh(size, "lockstep"), range(size), Alone())


def _refuse_many_alone() -> None:
    """Processes of one launch without a group would each load the whole model, and nobody would notice."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size > 1:
        raise ConfigError(
            "torchrun",
            found=f"WORLD_SIZE={size} and no process group",
            expected="one group of all ranks",
            remedy="call torch.distributed.init_process_group() before load, or pass ranks=",
        )


def _world_name() -> str:
    group = dist.group.WORLD
    assert group is not None, "the default process group is initialized"
    return group.group_name
