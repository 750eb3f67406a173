"""Some ranks measure while the others wait for what they find; see `calibrate.py`."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from bdlora_compile.runtime.agreement import agreement_of

_LIMIT = timedelta(minutes=30)
"""How long others wait. If a rank ends with an error, the launcher ends them before."""

_T = TypeVar("_T")


def measure_on_first(ranks: int, measure: Callable[[dist.ProcessGroup], _T]) -> _T:
    """Run ``measure`` on the first ``ranks`` ranks, over their group; returns on all what rank 0 found.

    The others wait for the process group's store: a collective would keep their GPUs busy meanwhile.

    Raises:
        AgreementError: a rank was not there in half an hour.
    """
    everyone = dist.group.WORLD
    assert everyone is not None, "a process group is there"
    group = everyone if ranks == everyone.size() else dist.new_group(range(ranks))
    agreement, found = agreement_of([everyone], _LIMIT), None
    if everyone.rank() < ranks:
        assert isinstance(group, dist.ProcessGroup), "this rank is in the group"
        found = measure(group)
    own = pickle.dumps(found).hex() if everyone.rank() == 0 else ""
    of_first, *_ = agreement.exchange("measurements", own)
    result: _T = pickle.loads(bytes.fromhex(of_first))
    return result
