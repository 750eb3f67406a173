"""vLLM's and SGLang's LoRA kernels on the same products, shapes and batches as ours; see `fetch_peers.sh`.

SGLang's back end ``triton_v2`` runs with its shipped plan and with each of a few plans tried for every group of sites,
the fastest kept: "tuned". vLLM runs as its default configuration does. Their routing of tokens is built once a forward
and is outside what is timed, as ours is.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lora_layers import Case, Layers
from benchmarks.peer_stubs import Phase, install
from benchmarks.replays import replay_us


def is_comparable(case: Case) -> bool:
    """Whether the peers have this: one rank for all, no packed blocks."""
    return case.blocks == 1 and not case.mixed and case.dtype == "bf16"


class Peers:
    """The peers' weights and kernels for a case; products, x and y are those of ``layers``.

    Args:
        root: the folder that `fetch_peers.sh` filled.
    """

    def __init__(self, layers: Layers, root: Path) -> None:
        _import_peers(root)
        self.layers, self.case = layers, layers.case
        self._factors = [[self._random_factors(group) for group in layers.groups] for _ in range(layers.num_layers)]
        self._runner = self._sglang_runner()
        self._meta = self._vllm_meta()

    def _random_factors(self, group: Any) -> tuple[Tensor, Tensor]:
        """(A [slots, n * r, D], B [slots, O, r])."""
        case, r = self.case, self.case.width
        make = {"device": "cuda", "dtype": torch.bfloat16}
        a = torch.randn(case.slots, len(group.out_features) * r, group.in_features, **make) / 16
        return a, torch.randn(case.slots, sum(group.out_features), r, **make) / 16

    def _sglang_runner(self) -> Any:
        from sglang.srt.lora.dense.runner import DenseLoraRunner
        from sglang.srt.lora.workspace import LoraWorkspace

        case = self.case
        runner = DenseLoraRunner(
            LoraWorkspace(), max_loras=case.slots, device=torch.device("cuda"), architecture="sm90"
        )
        runner.begin_batch(
            token_slots=self.layers.token_slot,
            lora_ranks=torch.full((case.slots,), case.width, dtype=torch.int32, device="cuda"),
            scalings=torch.full((case.slots,), 0.5, device="cuda"),
            num_tokens=case.tokens,
            phase=Phase.PREFILL if case.tokens > 256 else Phase.DECODE,
            graph_mode=True,
            is_prefill_graph=False,
        )
        return runner

    def _vllm_meta(self) -> Any:
        from vllm.lora.ops.triton_ops import utils
        from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

        # Its tables of pointers are kept by address; the factors are new ones.
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()
        meta = LoRAKernelMeta.make(self.case.slots, self.case.tokens, "cuda")
        meta.prepare_tensors(self.layers.token_slot)
        return meta.meta_args(self.case.tokens, False)

    def shipped_plan(self, group: int) -> Any:
        """The plan of SGLang's table."""
        from sglang.srt.lora.dense.plan import DenseLoraKind

        description = self.layers.groups[group]
        return self._runner.plan_for(
            DenseLoraKind.LINEAR, self.case.width, description.in_features, sum(description.out_features),
            num_tokens=self.case.tokens,
        )  # fmt: skip

    def other_plans(self) -> Iterator[Any]:
        """Plans that were the best of a wider search on some of these shapes."""
        from sglang.srt.lora.dense.plan import AFamily, BFamily, DensePlan, Overlap, _a_tiles

        if self.case.tokens > 64 or self.case.slots > self.case.tokens or self.case.ranks == 1:
            return
        yield DensePlan(AFamily.ALL_SLOTS, BFamily.PER_ROW, Overlap.A)
        tiles = {**_a_tiles(), "SPLIT_K": 4, "SPLIT_MODE": "planes"}
        yield DensePlan(AFamily.GROUPED, BFamily.PER_ROW, Overlap.A, a_tiles=tiles)

    def sglang(self, layer: int, group: int, plan: Any) -> None:
        """The product and LoRA (its shrink beside the product, where the plan says so)."""
        a, b = self._factors[layer][group]
        offsets = tuple(itertools.accumulate(self.layers.groups[group].out_features, initial=0))

        def base() -> Tensor:
            self.layers.base(layer, group)
            return self.layers.y[group]

        self._runner.apply(self.layers.x[group], base, plan, a=a, b=b, offsets=offsets)

    def vllm(self, layer: int, group: int) -> None:
        """The product and LoRA."""
        from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
        from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

        self.layers.base(layer, group)
        a, b = self._factors[layer][group]
        sizes, r = self.layers.groups[group].out_features, self.case.width
        # Contiguous tensors of the same shapes; which numbers they hold does not matter here.
        a_parts = [part.view(self.case.slots, 1, r, -1) for part in a.view(len(sizes), self.case.slots, r, -1)]
        flat, b_parts = b.view(-1), []
        for size in sizes:
            b_parts.append(flat[: self.case.slots * size * r].view(self.case.slots, 1, size, r))
            flat = flat[self.case.slots * size * r :]
        h = torch.empty(len(sizes), self.case.tokens, r, dtype=torch.float32, device="cuda")
        _lora_shrink(self.layers.x[group], a_parts, h, *self._meta, 1.0)
        _lora_expand(h, b_parts, self.layers.y[group], *self._meta, offset_start=0, add_inputs=True)

    def measure(self, with_vllm: bool) -> dict[str, float]:
        """Microseconds that LoRA adds to a layer, by method."""
        base = self.layers.us(False)
        shipped = [self.shipped_plan(group) for group in range(4)]
        as_shipped = self._us(shipped)
        best = [self._best_plan(group, shipped, as_shipped) for group in range(4)]
        added = {"sglang": as_shipped - base, "sglang tuned": min(as_shipped, self._us(best)) - base}
        if with_vllm:
            added["vllm"] = self._time(lambda layer, group: self.vllm(layer, group)) - base
        return added

    def _best_plan(self, group: int, shipped: list[Any], as_shipped: float) -> Any:
        """The plan with which a layer is fastest, the other groups as shipped."""
        found = [(as_shipped, 0, shipped[group])]
        for number, plan in enumerate(self.other_plans(), 1):
            with contextlib.suppress(Exception):  # a plan that cannot run a shape is no candidate
                found.append((self._us([*shipped[:group], plan, *shipped[group + 1 :]]), number, plan))
        return min(found, key=lambda row: row[:2])[2]

    def compile(self, group: int, with_vllm: bool) -> None:
        """Run everything once for a group of sites."""
        for plan in (self.shipped_plan(group), *self.other_plans()):
            with contextlib.suppress(Exception):
                self.sglang(0, group, plan)
        if with_vllm:
            self.vllm(0, group)

    def _us(self, plans: list[Any]) -> float:
        return self._time(lambda layer, group: self.sglang(layer, group, plans[group]))

    def _time(self, step: Any) -> float:
        def run() -> None:
            for layer, group in itertools.product(range(self.layers.num_layers), range(4)):
                self.layers.arrive(group)
                step(layer, group)

        return replay_us(run, groups=5, milliseconds=6) / self.layers.num_layers

    def error(self) -> float:
        """Largest relative error of SGLang's shipped plan on the first layer against float64."""
        worst = 0.0
        for number, group in enumerate(self.layers.groups):
            x, a, b = self.layers.x[number].double(), *self._factors[0][number]
            wanted, r, start = x @ self.layers.weights[0][number].double().t(), self.case.width, 0
            for index, size in enumerate(group.out_features):
                for slot in range(self.case.active):
                    rows = self.layers.token_slot == slot
                    h = x[rows] @ a[slot, index * r : (index + 1) * r].double().t()
                    wanted[rows, start : start + size] += 0.5 * h @ b[slot, start : start + size].double().t()
                start += size
            self.sglang(0, number, self.shipped_plan(number))
            worst = max(worst, float((self.layers.y[number].double() - wanted).norm() / wanted.norm()))
        return worst


def _import_peers(root: Path) -> None:
    """Once a process."""
    import sys

    if "vllm" in sys.modules:
        return
    install(root)
    import sglang.kernels.ops.lora.common.routing as routing

    # Larger batches use an aligner that is built at run time; the route is outside what is timed.
    routing._LARGE_ROUTE_MIN_PAIRS = 513
