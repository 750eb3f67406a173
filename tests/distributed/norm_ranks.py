"""All-reduces with residual and norm on some ranks: the kernel in Triton's interpreter, and graphs that call it.

Run by `tests.distributed.launch`. The ranks' mailboxes are files that both map, so what one writes the other sees while
it waits: as on GPUs, but that a CPU keeps writes in order.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2Config

import bdlora_compile as bd
from bdlora_compile import fused_norm_paths, fused_norms
from bdlora_compile.machine import SymmetricLimits
from bdlora_compile.plan import ModelPlan
from bdlora_compile.report import PassStats
from bdlora_compile.rms_norms import norm_of
from bdlora_compile.runtime.all_reduce import AllReduce
from bdlora_compile.runtime.kernels import launch_norm, norm
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.norm_op import all_reduce_add_norm
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

OF_LLAMA = ("model_type", "architectures", "transformers_version", "attention_bias", "mlp_bias")
MLP, DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
COLUMNS = 24
FIRST_LINE = 16
"""Where the first row's line begins in a mailbox: there rank 0 tells of its exchanges."""
EPSILON = 1e-5
FLOAT32 = 4 * 2.0**-23
"""The mean of 24 squares, its root and two products, each rounded in float32; measured 1.2e-7."""


@contextmanager
def patched(module: Any, name: str, value: object) -> Iterator[None]:
    """An attribute of a module replaced for a while."""
    intact = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, intact)


def mailbox(folder: Path, name: str) -> Tensor:
    """This rank's mailbox, with the addresses at which this process sees both."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = folder / f"{name}-{rank}"
    own.write_bytes(bytes(8 * norm.MAILBOX_WORDS))
    dist.barrier()
    paths = [str(folder / f"{name}-{peer}") for peer in range(size)]
    boxes = [torch.from_file(path, shared=True, size=norm.MAILBOX_WORDS, dtype=torch.int64) for path in paths]
    boxes[rank][:size] = torch.tensor([box.data_ptr() for box in boxes])
    # A mapping ends with its tensor.
    boxes[rank].peers = boxes  # type: ignore[attr-defined]  # kept alive
    dist.barrier()
    return boxes[rank]


def integers(turn: int, rank: int, rows: int) -> Tensor:
    """float32 [rows, COLUMNS] of small integers, so that sums are exact."""
    return ((torch.arange(rows * COLUMNS) * 7 + turn * 5 + rank * 13) % 31 - 15).float().view(rows, COLUMNS)


def delta_of(values: Tensor) -> Tensor:
    """What a rank's x lacks, [BY_TOKEN_LIMIT, COLUMNS]: NaN behind these rows."""
    rows = values.view(-1, COLUMNS)
    return torch.cat([rows, torch.full((BY_TOKEN_LIMIT - rows.shape[0], COLUMNS), float("nan"), dtype=rows.dtype)])


def expected(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(residual + x, its norm) in float64."""
    total = residual.double() + x.double()
    return total, total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


def exchange(box: Tensor, rows_of_turns: Sequence[int]) -> int:
    """Turns that gave a wrong sum on this rank; the ranks are late in turn, and in odd turns their x lack a delta."""
    rank, size = dist.get_rank(), dist.get_world_size()
    weight, wrong = torch.linspace(0.5, 2, COLUMNS), 0
    for turn, rows in enumerate(rows_of_turns):
        if turn % 4 == 2 * rank:
            time.sleep(0.05)
        summands = [integers(turn, peer, rows) for peer in range(size)]
        residual = integers(turn, size, rows)
        missing = [integers(turn, size + 1 + peer, rows) for peer in range(size)] if turn % 2 else []
        delta = delta_of(missing[rank]) if missing else None
        total, normed = launch_norm.reduce_add_norm(summands[rank], residual, weight, box, EPSILON, rank, size, delta)
        exact, exact_norm = expected(sum([*summands, *missing], torch.zeros(())), residual, weight)
        if torch.equal(total.double(), exact):
            assert (normed - exact_norm).abs().max() / exact_norm.abs().max() < FLOAT32
        else:
            wrong += 1
    dist.barrier()
    return wrong


def as_late_as_can_be(wait: Callable[..., object], box: Tensor, turns: int) -> Callable[..., object]:
    """The second rank reads when the first has written the values of the next exchange and told of it."""
    exchanges = iter(range(turns))

    def waiting(*arguments: object) -> None:
        wait(*arguments)
        number = next(exchanges)
        end = time.monotonic() + 60
        while dist.get_rank() == 1 and number < turns - 1 and int(box[FIRST_LINE]) < number + 2:
            assert time.monotonic() < end, "the first rank does not go on"

    return waiting


def check_kernel(folder: Path) -> str:
    """No sum is wrong, rows may come and go; without the wait some are."""
    rows = (1, 3, 2, 1, 1, 2, 3, 1)
    assert exchange(mailbox(folder, "sound"), rows) == 0
    with patched(norm, "_wait_for_peers", lambda *_: None):
        wrong = torch.tensor(exchange(mailbox(folder, "no-wait"), rows))
    dist.all_reduce(wrong)
    assert wrong > 0
    return f"kernel: {len(rows)} turns right; without the wait {int(wrong)} wrong"


def check_places(folder: Path) -> str:
    """Two places are enough for the latest of readers; one is not."""
    turns, intact = 5, norm._place

    def one_place(mailbox: Any, row: Any, exchange: Any, values: Any) -> Any:
        return intact(mailbox, row, exchange * 0, values)

    box = mailbox(folder, "two-places")
    with patched(norm, "_wait_for_peers", as_late_as_can_be(norm._wait_for_peers, box, turns)):
        assert exchange(box, [1] * turns) == 0
    box = mailbox(folder, "one-place")
    with (
        patched(norm, "_wait_for_peers", as_late_as_can_be(norm._wait_for_peers, box, turns)),
        patched(norm, "_place", one_place),
    ):
        wrong = exchange(box, [1] * turns)
    # Of more than two ranks the others, which nobody holds back, may be late too.
    if dist.get_rank() == 1:
        assert wrong == turns - 1
    elif dist.get_world_size() == 2:
        assert wrong == 0
    return f"places: {turns} turns right; with one place {turns - 1} wrong"


def distance(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest relative error; NaN if any value is."""
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(found, right, strict=True)]).max())


def check_operator(folder: Path) -> str:
    """Where there is no kernel the operator does one after the other: against float64, the same bits on all ranks.

    In bf16 what the ranks' x lack is part of the sum; in float32 it is not read, for there every x has it already.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None, "initialized in main"
    group: Any = dist.group.WORLD.group_name
    nothing, weight = torch.zeros(1, dtype=torch.uint8), torch.linspace(0.5, 2, COLUMNS)
    # Roundings of half a unit in the last place each, of values up to twice the largest result: four, and with a delta
    # one of each rank's x.
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(9)
        values = [torch.randn(2, 3, COLUMNS, generator=generator).to(dtype) for _ in range(2 * size + 1)]
        summands, missing, residual = values[:size], values[size:-1], values[-1]
        own, scale = summands[rank], weight.to(dtype)
        exchange = (nothing, nothing, EPSILON, 0, 0, group)
        without = expected(sum(summands, torch.zeros(()).double()), residual, scale)
        complete = expected(sum([*summands, *missing], torch.zeros(()).double()), residual, scale)
        of_one = expected(summands[0] + missing[0].double(), residual, scale)
        with_delta = (without, complete) if dtype is torch.float32 else (complete, without)
        for delta, (right, *twins) in ((None, (without, of_one)), (delta_of(missing[rank]), (*with_delta, of_one))):
            tolerance = (4 if delta is None else 4 + size) * torch.finfo(dtype).eps
            pair = all_reduce_add_norm(own, residual, scale, *exchange, delta)
            assert distance(pair, right) < tolerance
            assert not any(distance(pair, twin) < tolerance for twin in twins)
            for found in pair:
                all_ranks = [torch.empty_like(found) for _ in range(size)]
                dist.all_gather(all_ranks, found)
                assert all(torch.equal(other, found) for other in all_ranks)
    return "operator: right in float32 and bf16, where it adds a delta"


def check_graph(folder: Path) -> str:
    """A model whose norms are part of its all-reduces has the very logits of one whose norms are not."""
    adapters = {"blocks": folder / "blocks"}
    fake = AllReduce("by hand", torch.zeros(1, dtype=torch.uint8), SymmetricLimits(0, 0))
    fused = replace(fake, mailbox=torch.zeros(1, dtype=torch.int64))
    apart, _ = logits(folder, adapters, fake)
    together, counts = logits(folder, adapters, fused)
    assert counts == {"with adapters": (3, 0), "base only": (3, 0)}, counts
    assert torch.equal(apart, together)
    intact = norm_of

    def other_epsilon(value: torch.fx.Node) -> Any:
        found = intact(value)
        return found if isinstance(found, str) else replace(found, epsilon=0.5)

    with patched(fused_norms, "norm_of", other_epsilon):
        assert not torch.equal(logits(folder, adapters, fused)[0], apart)
    return f"graph: the same logits, {counts}"


def logits(folder: Path, adapters: dict[str, Path], transport: AllReduce) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """A prompt with an adapter, and without: logits of both; and what the report says of the norms."""
    torch._dynamo.reset()
    with patched(AllReduce, "choose", lambda *_: transport):
        model, pool = bd.load(folder / "model", adapters, dtype=torch.float32)
        model.compile(backend="bdlora", options={"inner": "eager"})
        ids = torch.arange(3, 13).view(2, 5)
        with torch.no_grad():
            with pool.use(["blocks", None]):
                first = model(ids).logits
            second = model(ids).logits
    report = bd.reports(model)[-1]
    assert ("residual and norm in one, base only: 3 of 3" in report.summary()) == (transport.mailbox is not None)
    return torch.cat([first, second], 1), {
        name: (stats.matches, len(stats.refusals)) for name, stats in report.norms.items()
    }


BF16 = 0.04
"""Relative to the largest logit, of three or four layers in bf16 against float32; 1.5e-2 where all paths stay apart."""


def check_paths(folder: Path) -> str:
    """Graphs in the form for GPUs, by the operators' plain implementations: activations, norms and rotations add LoRA.

    With few tokens they do, with many they do not. Without the adapter the error is many times that.
    """
    texts = []
    for strategy, kind in (("local", "blocks"), ("slora", "plain")):
        for tokens in (5, 40):
            exact, _ = answers(folder, kind, strategy, tokens, torch.float32, for_gpus=False)
            found, stats = answers(folder, kind, strategy, tokens, torch.bfloat16, for_gpus=True)
            assert stats is not None
            assert (stats.matches, stats.refusals) == (4, []), stats
            own, twin = ((value - exact[0]).abs().max() / exact.abs().max() for value in found)
            assert own < BF16, (strategy, tokens, own)
            assert not twin < 2 * BF16, (strategy, tokens, twin)
            texts.append(f"{strategy}, {2 * tokens} tokens {own:.1e} (without {twin:.1e})")
    return f"paths: {'; '.join(texts)}"


def check_kinds(folder: Path) -> str:
    """Two kinds of layers that alternate: what down lacks goes to the norm of a layer of the other kind."""
    even = [f"layers.{layer}.{site}" for layer in (0, 2) for site in (*map("self_attn.{}_proj".format, "qkv"), DOWN)]
    odd = [f"layers.{layer}.{site}" for layer in (1, 3) for site in ("self_attn.o_proj", *MLP, DOWN)]
    if dist.get_rank() == 0:
        save_model(ModelSpec(layers=4), folder / "four" / "model")
        save_adapter(AdapterSpec(rank=8, targets=[*even, *odd]), folder / "four" / "model", folder / "four" / "kinds")
    dist.barrier()

    def logits_of(dtype: torch.dtype, *, for_gpus: bool) -> tuple[Tensor, PassStats | None]:
        targets = [*even, *odd]
        return answers(folder / "four", "kinds", "local", 5, dtype, for_gpus=for_gpus, targets=targets)

    exact, _ = logits_of(torch.float32, for_gpus=False)
    found, stats = logits_of(torch.bfloat16, for_gpus=True)
    assert stats is not None
    assert (stats.matches, stats.refusals) == (5, []), stats
    own = (found - exact)[0].abs().max() / exact.abs().max()

    intact = fused_norm_paths._over_the_boundary

    def nothing(graph: torch.fx.Graph, norm: torch.fx.Node, _: torch.fx.Node) -> torch.fx.Node:
        return intact(graph, norm, fused_norm_paths._insert_nothing(graph, norm))

    with patched(fused_norm_paths, "_over_the_boundary", nothing):
        wrong, _ = logits_of(torch.bfloat16, for_gpus=True)
    twin = (wrong - exact)[0].abs().max() / exact.abs().max()
    assert own < BF16, own
    assert not twin < 2 * BF16, twin
    return f"kinds of layers: {own:.1e} (with nothing over the boundaries {twin:.1e})"


def answers(
    folder: Path,
    kind: str,
    strategy: Any,
    tokens: int,
    dtype: torch.dtype,
    *,
    for_gpus: bool,
    targets: list[str] | None = None,
) -> tuple[Tensor, PassStats | None]:
    """Logits of one prompt with an adapter and without, [2, tokens, vocabulary] in float32; which paths were fused."""
    torch._dynamo.reset()
    fake = AllReduce("by hand", torch.zeros(1, dtype=torch.uint8), SymmetricLimits(0, 0), torch.zeros(1).long())
    with (
        patched(AllReduce, "choose", lambda *_: fake),
        patched(ModelPlan, "is_for_gpus", for_gpus),
    ):
        options: dict[str, Any] = {"dtype": dtype, "strategy": strategy, "target_modules": targets}
        model, pool = bd.load(folder / "model", {kind: folder / kind}, **options)
        model.compile(backend="bdlora", options={"inner": "eager"})
        ids = torch.arange(3, 3 + tokens).expand(2, tokens)
        with torch.no_grad(), pool.use([kind, None]):
            found = model(ids, past_key_values=bd.make_cache(model, 2, tokens)).logits.float()
    return found, bd.reports(model)[-1].paths


def qwen2(layers: int) -> Qwen2Config:
    """Sizes of `ModelSpec`, and q, k and v with a bias."""
    llama = ModelSpec(layers=layers).config().to_dict()
    return Qwen2Config(**{name: value for name, value in llama.items() if name not in OF_LLAMA})


def main() -> int:
    """All checks; a line for each."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        save_model(qwen2(layers=3), folder / "model")
        save_adapter(AdapterSpec(rank=8, nblocks=4), folder / "model", folder / "blocks")
        save_adapter(AdapterSpec(rank=8), folder / "model", folder / "plain")
    dist.barrier()
    for check in (check_kernel, check_places, check_operator, check_graph, check_paths, check_kinds):
        text = check(folder)
        if dist.get_rank() == 0:
            print(f"case: {text}", flush=True)
    dist.destroy_process_group()
    return 0
