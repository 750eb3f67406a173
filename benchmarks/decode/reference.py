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
    names = {kind: [f"{kind}-0", f"{kind}-1", None, f"{kind}-2"] for kind in kinds}
    found: dict[torch.dtype, dict[str, Tensor]] = {}
    for precision in dict.fromkeys([torch.float32, dtype]):
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=precision, **_placed(device)).to(device).eval()
        found[precision] = {kind: _logits(base, adapters, rows, ids.to(device)) for kind, rows in names.items()}
        del base
    return {
        kind: Expected(found[torch.float32][kind], _relative(found[dtype][kind], exact), torch.finfo(dtype).eps / 2)
        for kind, exact in found[torch.float32].items()
    }


@torch.no_grad()
def _logits(base: Any, adapters: Path, names: Sequence[str | None], ids: Tensor) -> Tensor:
    """Row by row, each with its adapter; the model is left without adapters."""
    rows: list[Tensor] = []
    for row, name in zip(ids, names, strict=True):
        wrapped = base
        if name is not None:
            settings: dict[str, Any] = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
            wrapped = PeftModel.from_pretrained(base, adapters / name, **settings).eval()
        rows.append(wrapped(row[None], use_cache=False, logits_to_keep=STEPS + 1).logits[0].float().cpu())
        if name is not None:
            wrapped.unload()
    return torch.stack(rows)


def _placed(device: torch.device) -> dict[str, Any]:
    """Read weights straight to the device where accelerate is there to do it."""
    return {"device_map": {"": device}} if find_spec("accelerate") is not None else {}


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float().cpu() - exact).abs().max() / exact.abs().max())
