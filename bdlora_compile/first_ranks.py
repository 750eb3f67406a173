"""Some ranks measure while the others wait for what they find; see `calibrate.py`."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

_LIMIT = timedelta(minutes=30)
"""How long others wait. If a rank ends with an error, the launcher ends them before."""

_T = TypeVar("_T")


def measure_on_first(ranks: int, measure: Callable[[dist.ProcessGroup], _T]) -> _T:
    """Run ``measure`` on the first ``ranks`` ranks, over their group; returns on all what rank 0 found.

    The others wait for the process group's store: a collective would keep their GPUs busy meanwhile.
    """
    is_all = ranks == dist.get_world_size()
    group = dist.group.WORLD if is_all else dist.new_group(range(ranks))
    store = PrefixStore("bdlora/first-ranks", dist.distributed_c10d._get_default_store())
    key = f"found/{store.add(f'calls/{dist.get_rank()}', 1)}"
    if dist.get_rank() < ranks:
        assert isinstance(group, dist.ProcessGroup), "this rank is in the group"
        found = measure(group)
        if dist.get_rank() == 0:
            store.set(key, pickle.dumps(found).hex())
    store.wait([key], _LIMIT)
    result: _T = pickle.loads(bytes.fromhex(bytes(store.get(key)).decode()))
    return result
