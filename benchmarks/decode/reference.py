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


@dataclass(frozen=True)
class Expected:
    """Logits of the prompts by kind of adapter.

    Attributes:
        exact: in float32, [rows, STEPS + 1, vocabulary].
        rounding: the relative error of PEFT's own eager result in the dtype of the runs.
        unit: relative error of one rounding in that dtype.
    """

    exact: Tensor
    rounding: float
    unit: float

    @property
    def tolerance(self) -> float:
        """Twice PEFT's own error (sums are rounded in another order on several ranks), and one rounding."""
        return 2 * self.rounding + max(self.unit, 1e-5)

    def error(self, found: Tensor) -> float:
        """Relative error of logits [rows, STEPS + 1, vocabulary]."""
        return _relative(found, self.exact)

    def check(self, found: Tensor) -> str:
        """One line that says how far off the logits are, and whether greedy tokens are equal where ties allow.

        Raises:
            AssertionError: farther than the tolerance, or another token where float32's lead is beyond it.
        """
        error = self.error(found)
        assert error < self.tolerance, f"relative error {error:.2e}, allowed {self.tolerance:.2e}"
        best = self.exact.topk(2).values
        is_clear = (best[..., 0] - best[..., 1]) > 2 * self.tolerance * self.exact.abs().max()
        equal = found.argmax(-1).cpu() == self.exact.argmax(-1)
        assert bool(equal[is_clear].all()), "another greedy token where there is no tie"
        share = f"{int(equal.sum())} of {equal.numel()} greedy tokens equal, all of {int(is_clear.sum())} clear ones"
        return f"relative error {error:.2e} (PEFT's own {self.rounding:.2e}, allowed {self.tolerance:.2e}), {share}"


def prompts() -> Tensor:
    """The prompts that are compared, int64 [4, PROMPT], the same on all ranks."""
    return torch.randint(5, 1000, (4, PROMPT), generator=torch.Generator().manual_seed(2))


def references(
    model: Path, adapters: Path, kinds: Sequence[str], dtype: torch.dtype, device: torch.device
) -> Mapping[str, Expected]:
    """Expected logits of each kind of adapter, four rows: two adapters of the kind, none, and a third adapter."""
    ids = prompts()
    rows = [
        (adapters / f"{kind}-{number}" if number is not None else None, row)
        for kind in kinds
        for number, row in zip((0, 1, None, 2), ids, strict=True)
    ]
    found: dict[torch.dtype, dict[str, Tensor]] = {}
    for precision in dict.fromkeys([torch.float32, dtype]):
        logits = torch.stack(reference_logits(model, rows, precision, device, STEPS + 1))
        found[precision] = dict(zip(kinds, logits.split(len(ids)), strict=True))
    return {
        kind: Expected(found[torch.float32][kind], _relative(found[dtype][kind], exact), torch.finfo(dtype).eps / 2)
        for kind, exact in found[torch.float32].items()
    }


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
        allowed: twice what it is for PEFT's own choices in the dtype of the runs, and one rounding.
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
    allowed = 2 * _gap(exact, rounded.argmax(2)) + max(torch.finfo(dtype).eps / 2, 1e-5)
    return Choices(_gap(exact, chosen), allowed, _gap(swapped, chosen))


def _gap(logits: Tensor, chosen: Tensor) -> float:
    own = logits.gather(2, chosen[:, :, None])[..., 0]
    return float((logits.amax(2) - own).max() / logits.abs().max())


def _placed(device: torch.device) -> dict[str, Any]:
    """Read weights straight to the device where accelerate is there to do it."""
    return {"device_map": {"": device}} if find_spec("accelerate") is not None else {}


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float().cpu() - exact).abs().max() / exact.abs().max())
