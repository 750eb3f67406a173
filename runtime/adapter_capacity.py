"""How much of everything a model's adapters get: slots, pool, host memory, rank and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from bdlora_compile.errors import ConfigError
from bdlora_compile.factors import Layout
from bdlora_compile.plan import ModelPlan
from bdlora_compile.runtime.adapter_file import Adapter
from bdlora_compile.runtime.adapter_stats import adapter_elements, adapters_that_fit

_DEFAULT_RANK = 16
_DEFAULT_ADAPTERS = 8


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was asked for when the model was loaded.

    Attributes:
        max_adapters: adapters that can be resident at once, None to let the rest decide.
        least_adapters: the fewest slots if nothing was asked for.
        max_rank: largest adapter rank R.
        max_local_rank: largest rank of an adapter's factors on one rank; ``max_rank`` admits ordinary adapters.
        max_tokens: tokens that one forward may have.
        pool_bytes: of a rank's pool, None for room for ``max_adapters`` adapters of the largest kind admitted.
        host_bytes: of a rank's copies in host memory, None for the default of `AdapterSet`.
    """

    max_adapters: int | None
    least_adapters: int
    max_rank: int
    max_local_rank: int
    max_tokens: int
    pool_bytes: int | None
    host_bytes: int | None

    @classmethod
    def choose(
        cls,
        adapters: Sequence[Adapter],
        max_adapters: int | None,
        max_rank: int | None,
        max_local_rank: int | None,
        max_tokens: int,
        pool_bytes: int | None,
        host_bytes: int | None,
    ) -> "Capacity":
        """Fill in what was not asked for from the adapters that are loaded first.

        Raises:
            ConfigError: a number is too small.
        """
        _check("max_adapters", max_adapters)
        _check("max_rank", max_rank)
        _check("max_local_rank", max_local_rank)
        _check("max_tokens", max_tokens)
        _check("pool_bytes", pool_bytes)
        _check("host_bytes", host_bytes, least=0)
        largest = max((adapter.max_rank for adapter in adapters), default=_DEFAULT_RANK)
        least = max(len(adapters), _DEFAULT_ADAPTERS)
        rank = max_rank or largest
        return cls(max_adapters, least, rank, min(max_local_rank or rank, rank), max_tokens, pool_bytes, host_bytes)

    def pool(self, plan: ModelPlan) -> tuple[int, int]:
        """Slots, and elements of the pool; the same on every rank."""
        if self.pool_bytes is None:
            slots = self.max_adapters or self.least_adapters
            # An ordinary adapter on every site takes the most that any kind of its local rank does.
            return slots, slots * adapter_elements(plan, self._pool_rank(plan))
        elements = self.pool_bytes // plan.dtype.itemsize
        fit = adapters_that_fit(plan, elements, self.max_rank, plan.mesh.size) or 0
        return self.max_adapters or max(self.least_adapters, fit), elements

    def _pool_rank(self, plan: ModelPlan) -> int:
        """S-LoRA's layout divides every adapter's rank by itself: there its whole rank counts."""
        is_local = all(layout is Layout.LOCAL for layout in plan.layouts.values())
        return self.max_local_rank if is_local else self.max_rank


def _check(name: str, value: int | None, least: int = 1) -> None:
    if value is not None and value < least:
        raise ConfigError(name, found=str(value), expected=f"at least {least}", remedy=f"choose a larger {name}")
