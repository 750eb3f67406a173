"""What transformers and PEFT compute, uncompiled, in float32 and in the dtype of the runs: every column's measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

PROMPT = 24
"""Tokens of the prompts that are compared."""
STEPS = 6
"""So many of them come by decode steps; logits of these and of the token before are compared."""


ROWS = (0, 1, None, 2)
"""Which adapter of a kind each row of the prompts has; None for none."""
COPIES = 8
"""How often these rows come in a second batch that is compared: decode steps of so many rows have LoRA of their own."""
OTHERS = (1, None, 2, 0)
"""Another for each."""
NO_ADAPTER = "none"
"""What rows without adapters are called among the kinds."""


@dataclass(frozen=True)
class Check:
    """How far off a column's logits are, relative to the largest of float32.

    Attributes:
        error: largest distance from float32.
        rounding: the same of PEFT's own eager result in the dtype of the runs.
        allowed: twice that (sums are rounded in another order on several ranks), and one rounding.
        swapped: distance from float32 with another adapter for each row, of the row where it is smallest.
        gap: how far the greedy tokens are behind float32's likeliest.
        gap_allowed: as much as PEFT's own logits are off, and one rounding (two that are off so may change places at
            twice as much).
        equal, tokens: greedy tokens that are float32's, and all of them.
    """

    error: float
    rounding: float
    allowed: float
    swapped: float
    gap: float
    gap_allowed: float
    equal: int
    tokens: int

    @property
    def text(self) -> str:
        """One line."""
        return (
            f"relative error {self.error:.2e} (PEFT's own {self.rounding:.2e}, allowed {self.allowed:.2e}; with other "
            f"adapters {self.swapped:.2e}), {self.equal} of {self.tokens} greedy tokens equal, the others at most "
            f"{self.gap:.2e} of the largest logit behind (allowed {self.gap_allowed:.2e})"
        )

    def verify(self) -> None:
        """Hold it against what is allowed.

        Raises:
            AssertionError: the logits or the greedy tokens are off, or another adapter would not have been noticed.
        """
        assert self.error < self.allowed, f"the logits are off: {self.text}"
        assert self.gap <= self.gap_allowed, f"a greedy token is off: {self.text}"
        assert self.swapped > self.allowed, f"other adapters would not be noticed: {self.text}"


@dataclass(frozen=True)
class Expected:
    """Logits of the prompts with a kind of adapter, [rows, STEPS + 1, vocabulary].

    Attributes:
        exact: in float32.
        rounded: in the dtype of the runs, by transformers and PEFT.
        swapped: in float32, with another adapter for each row.
        unit: relative error of one rounding in the dtype of the runs.
    """

    exact: Tensor
    rounded: Tensor
    swapped: Tensor
    unit: float

    def check(self, found: Tensor) -> Check:
        """What a column found, against these; of several copies of the rows all."""
        found = found.float().cpu()
        copies = found.shape[0] // self.exact.shape[0]
        exact, swapped = (logits.repeat(copies, 1, 1) for logits in (self.exact, self.swapped))
        rounding = _relative(self.rounded, self.exact)
        chosen = found.argmax(2)
        return Check(
            error=_relative(found, exact),
            rounding=rounding,
            allowed=_allowed(rounding, self.unit, times=2),
            swapped=float((found - swapped).abs().amax((1, 2)).min() / exact.abs().max()),
            gap=_gap(exact, chosen),
            gap_allowed=_allowed(rounding, self.unit, times=1),
            equal=int((chosen == exact.argmax(2)).sum()),
            tokens=chosen.numel(),
        )


def prompts() -> Tensor:
    """The prompts that are compared, int64 [4, PROMPT], the same on all ranks."""
    return torch.randint(5, 1000, (4, PROMPT), generator=torch.Generator().manual_seed(2))


def references(
    model: Path, adapters: Path, kinds: Sequence[str], dtype: torch.dtype, device: torch.device
) -> Mapping[str, Expected]:
    """Expected logits of each kind of adapter (`ROWS`), and of rows without any (`NO_ADAPTER`)."""

    def rows_of(kind: str, numbers: Sequence[int | None]) -> list[tuple[Path | None, Tensor]]:
        folders = [None if number is None else adapters / f"{kind}-{number}" for number in numbers]
        return list(zip(folders, prompts(), strict=True))

    own = {kind: rows_of(kind, ROWS) for kind in kinds} | {NO_ADAPTER: rows_of("", [None] * len(ROWS))}
    others = {kind: rows_of(kind, OTHERS) for kind in kinds} | {NO_ADAPTER: rows_of(kinds[0], (0, 1, 2, 0))}

    def logits(columns: list[list[tuple[Path | None, Tensor]]], precision: torch.dtype) -> Sequence[Tensor]:
        rows = [row for column in columns for row in column]
        return torch.stack(reference_logits(model, rows, precision, device, STEPS + 1)).split(len(ROWS))

    # One load of the model for each dtype.
    found = logits([*own.values(), *others.values()], torch.float32)
    exact, swapped = found[: len(own)], found[len(own) :]
    rounded = exact if dtype is torch.float32 else logits([*own.values()], dtype)
    unit = torch.finfo(dtype).eps / 2
    columns = zip(own, exact, rounded, swapped, strict=True)
    return {name: Expected(right, near, other, unit) for name, right, near, other in columns}


@torch.no_grad()
def reference_logits(
    model: Path, rows: Sequence[tuple[Path | None, Tensor]], dtype: torch.dtype, device: torch.device, keep: int
) -> list[Tensor]:
    """What transformers and PEFT give for each row alone: its adapter (None for none) and its tokens, int64 [seq].

    Returns:
        Logits of the last ``keep`` tokens of each row, float32 [keep, vocabulary], on the CPU.
    """
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **_placed(device)).to(device).eval()
    found = []
    for adapter, ids in rows:
        wrapped = base
        if adapter is not None:
            settings: dict[str, Any] = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
            wrapped = PeftModel.from_pretrained(base, adapter, **settings).eval()
        found.append(wrapped(ids[None].to(device), use_cache=False, logits_to_keep=keep).logits[0].float().cpu())
        if adapter is not None:
            wrapped.unload()
    return found


@dataclass(frozen=True)
class Choices:
    """How far greedy tokens of many rows are from the likeliest ones, as shares of the largest logit.

    Attributes:
        gap: largest distance from float32's likeliest token to the one that was chosen, each step given those before.
        allowed: as much as PEFT's own logits are off in the dtype of the runs, and one rounding.
        swapped: ``gap`` of the same tokens under the adapter of the next row: what a wrong adapter would be.
    """

    gap: float
    allowed: float
    swapped: float

    @property
    def text(self) -> str:
        """One line."""
        return (
            f"greedy tokens are at most {self.gap:.2e} of the largest logit behind the likeliest of float32 "
            f"(allowed {self.allowed:.2e}); under the next row's adapter {self.swapped:.2e}"
        )


def greedy_choices(
    model: Path,
    adapters: Sequence[Path | None],
    prompts: Tensor,
    chosen: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> Choices:
    """Hold tokens that a server chose against transformers and PEFT, which are given the same tokens before each.

    Args:
        adapters: each row's folder, None for none.
        prompts: int64 [rows, seq].
        chosen: int64 [rows, new]; greedy tokens.
    """
    texts = torch.cat([prompts, chosen[:, :-1]], 1)

    rows = list(zip(adapters, texts, strict=True))
    with_next = list(zip([*adapters[1:], adapters[0]], texts, strict=True))
    keep = chosen.shape[1]
    exact, swapped = torch.stack(reference_logits(model, [*rows, *with_next], torch.float32, device, keep)).chunk(2)
    rounded = torch.stack(reference_logits(model, rows, dtype, device, keep))
    allowed = _allowed(_relative(rounded, exact), torch.finfo(dtype).eps / 2, times=1)
    return Choices(_gap(exact, chosen), allowed, _gap(swapped, chosen))


def _allowed(of_peft: float, unit: float, *, times: int) -> float:
    """So many times what PEFT's own logits are off in the dtype of the runs, and one rounding."""
    return times * of_peft + max(unit, 1e-5)


def _gap(logits: Tensor, chosen: Tensor) -> float:
    own = logits.gather(2, chosen[:, :, None])[..., 0]
    return float((logits.amax(2) - own).max() / logits.abs().max())


def _placed(device: torch.device) -> dict[str, Any]:
    """Read weights straight to the device where accelerate is there to do it."""
    return {"device_map": {"": device}} if find_spec("accelerate") is not None else {}


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float().cpu() - exact).abs().max() / exact.abs().max())
