"""What the operators do on GPUs, which launch kernels, against what they do elsewhere; here in Triton's interpreter.

Tolerance as in `test_kernels`: y is rounded, by the one once and by the other twice.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bdlora_compile.runtime import bridged_ops
from bdlora_compile.runtime.beside import product_beside
from bdlora_compile.runtime.bridged_ops import lora_expand_, lora_linear_bridged
from bdlora_compile.runtime.bridged_ops import lora_shrink_grouped as grouped
from bdlora_compile.runtime.cache_ops import cache_write_
from bdlora_compile.runtime.kernels import launch
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.linear_op import lora_linear, lora_linear_beside, with_delta
from bdlora_compile.runtime.norm_op import all_reduce_add_norm
from bdlora_compile.runtime.ops import lora_apply_, lora_expand, lora_shrink, lora_work
from bdlora_compile.runtime.rotary_op import rotate_and_cache
from bdlora_compile.runtime.swiglu_op import swiglu
from tests.kernels.test_kernels import DEVICE, Case, bank_of, error, inputs

TOLERANCE = 4 * 2.0**-11
SITES = [0, 1, 2]
RANKS = ((2, 4, 0), (8, 2, 3), (4, 4, 8))
EVEN_RANKS = ((2, 4, 0), (8, 2, 6), (4, 4, 8))


def on_gpu(operator: Any) -> Callable[..., Any]:
    """What runs for tensors on a GPU."""
    return operator if DEVICE.type == "cuda" else operator._backend_fns["cuda"]  # type: ignore[no-any-return]


def plain(operator: Any) -> Callable[..., Any]:
    """What runs for tensors elsewhere."""
    return operator._init_fn  # type: ignore[no-any-return]


class Call:
    """Arguments of the operators: fp16, tokens with three adapters and without one."""

    def __init__(
        self,
        tokens: int,
        out_features: tuple[int, ...] = (64, 32, 32),
        ranks: tuple[tuple[int, int, int], ...] = RANKS,
    ) -> None:
        self.case = Case(ranks, 64, out_features, 1, 1, tokens, 3, torch.float16, False)
        bank, _ = bank_of(self.case)
        self.x, self.y, _ = inputs(self.case)
        self.token_slot = (torch.arange(tokens, device=DEVICE) % 4 - 1).to(torch.int32)
        self.factors = (bank.pool, bank.slots, self.token_slot)
        self.bank = (bank.pool, bank.slots, bank.scales, self.token_slot)
        self.weight = (torch.randn(128, 64) / 4).to(DEVICE, torch.float16)
        self.bias = torch.randn(128).to(DEVICE, torch.float16)

    def work(self) -> tuple[Tensor, Tensor]:
        order, segments = on_gpu(lora_work)(self.x, self.token_slot)
        return order, segments

    def linear(self, run: Callable[..., Any]) -> Tensor:
        arguments = (*self.bank, *self.work(), SITES, 8, self.case.out_features)
        result: Tensor = run(self.x, self.weight, self.bias, *arguments)
        return result


@pytest.fixture(params=[5, 64, 65], ids=["by token", "the most by token", "by segment"])
def call(request: pytest.FixtureRequest) -> Call:
    return Call(request.param)


def test_shrink_and_expand(call: Call) -> None:
    h, wanted = (run(call.x, *call.factors, SITES, 8) for run in (on_gpu(lora_shrink), plain(lora_shrink)))
    assert error(h, wanted.double()) < TOLERANCE
    assert not h[call.token_slot < 0].any()
    found, wanted = (
        run(call.y, h, *call.bank, SITES, call.case.out_features, 1)
        for run in (on_gpu(lora_expand), plain(lora_expand))
    )
    assert error(found, wanted.double()) < TOLERANCE
    assert not error(call.y, wanted.double()) < 0.02


def test_apply(call: Call) -> None:
    found, wanted = call.y.clone(), call.y.clone()
    for y, run in ((found, on_gpu(lora_apply_)), (wanted, plain(lora_apply_))):
        assert run(call.x, y, *call.bank, *call.work(), SITES, 8, call.case.out_features) is None
    assert error(found, wanted.double()) < TOLERANCE
    assert not error(call.y, wanted.double()) < 0.02


def test_linear(call: Call) -> None:
    wanted = call.linear(plain(lora_linear)).double()
    assert error(call.linear(on_gpu(lora_linear)), wanted) < TOLERANCE
    assert not error(call.x @ call.weight.t() + call.bias, wanted) < 0.02


@pytest.fixture(params=[0, 5, 64, 65], ids=str)
def any_call(request: pytest.FixtureRequest) -> Call:
    """Up to 64 tokens have their LoRA beside the product."""
    return Call(request.param)


def check_beside(call: Call, run: Callable[..., Any], wanted: Callable[..., Any], *arguments: Any) -> None:
    """y and delta of an operator on a GPU against those elsewhere, and what the compiler is told of them."""
    with FakeTensorMode() as mode:
        told = wanted(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    (y, delta), (wanted_y, wanted_delta) = run(*arguments), plain(wanted)(*arguments)
    for results in ((y, delta), (wanted_y, wanted_delta)):
        assert [(value.shape, value.stride(), value.dtype) for value in results] == [
            (value.shape, value.stride(), value.dtype) for value in told
        ]
    if not (tokens := call.case.tokens):
        return
    without = (call.x @ call.weight.t() + call.bias).double()
    assert error(y, wanted_y.double()) < TOLERANCE
    assert (error(y, without) < TOLERANCE) is (tokens <= BY_TOKEN_LIMIT), "the twin: LoRA is in y, or beside it"
    assert torch.equal(with_delta(y, delta), y) is (tokens > BY_TOKEN_LIMIT)
    if tokens <= BY_TOKEN_LIMIT:
        own, wanted_own = delta[:tokens], wanted_delta[:tokens]
        assert error(own, wanted_own.double()) < TOLERANCE
        assert not error(1.05 * own, wanted_own.double()) < TOLERANCE, "the twin"
        assert not own[call.token_slot < 0].any()


def test_a_product_beside_its_lora(any_call: Call) -> None:
    call = any_call
    arguments = (call.x, call.weight, call.bias, *call.bank, *call.work(), SITES, 8, call.case.out_features)
    check_beside(call, on_gpu(lora_linear_beside), lora_linear_beside, *arguments)


class TwiceOverRanks:
    """Stands in for a sum over two ranks that have the same."""

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        return 2 * x

    _init_fn = __call__


@pytest.mark.parametrize("part", [0, 1])
def test_a_product_beside_an_exchange(any_call: Call, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank's share of h lies in a half of the room; the other is zero here, and this one counts twice."""
    monkeypatch.setattr(bridged_ops, "all_reduce", TwiceOverRanks())
    call = Call(any_call.case.tokens, ranks=EVEN_RANKS)
    transport = (torch.zeros(64, dtype=torch.uint8, device=DEVICE), 0, 0, "group")
    # Shares of ranks 4 and 2 are all that both ranks have; this one's A of another rank is read up to there.
    lora = (*call.bank, *call.work(), SITES, 8, call.case.out_features, 2, part)
    arguments = (call.x, call.weight, call.bias, *lora, *transport)
    check_beside(call, lora_linear_bridged._backend_fns["cuda"], lora_linear_bridged, *arguments)


@pytest.mark.parametrize("parts", [1, 2])
def test_how_many_share_an_adapter_to_have_their_delta_together(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As measured: fewer behind an exchange, whether ranks have shares of h (column sites) or all of it (row sites)."""
    monkeypatch.setattr(bridged_ops, "all_reduce", TwiceOverRanks())
    paths, delta = [], launch.delta

    def noted(h: Tensor, path: launch.Beside, columns: int, dtype: torch.dtype) -> Tensor:
        paths.append(path)
        return delta(h, path, columns, dtype)

    monkeypatch.setattr(launch, "delta", noted)
    call = Call(64, ranks=EVEN_RANKS)
    lora = (call.x, call.weight, call.bias, *call.bank, *call.work(), SITES, 8, call.case.out_features)
    transport = (torch.zeros(64, dtype=torch.uint8, device=DEVICE), 0, 0, "group")
    on_gpu(lora_linear_beside)(*lora)
    lora_linear_bridged._backend_fns["cuda"](*lora, parts, 0, *transport)
    assert [path.together for path in paths] == [8, 4]
    assert all(path.work is not None for path in paths)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="streams are a GPU's")
@pytest.mark.parametrize("bias", [None, 3.0])
def test_a_product_beside_others_is_there_behind_them(bias: float | None) -> None:
    """Also recorded, and replayed with other operands: what is launched next reads this replay's product."""
    x, weight = (torch.randn(size, 4096, device=DEVICE).half() for size in (16, 8192))
    added = None if bias is None else torch.full((8192,), bias, device=DEVICE).half()

    def run() -> Tensor:
        y, doubled = product_beside(x.sin(), weight, added, lambda: 2 * x)
        return y + doubled[:, :1]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(20):
        x.normal_()
        graph.replay()
        wanted = x.sin().double() @ weight.double().t() + 2 * x[:, :1].double() + (bias or 0.0)
        assert error(found, wanted) < TOLERANCE
        assert not error(found, wanted + 1) < TOLERANCE


@pytest.mark.parametrize("tokens", [5, 65])
def test_swiglu(tokens: int) -> None:
    """Of few tokens what lies beside the product is added, of many it is not read."""
    call = Call(tokens, (64, 64, 64))
    y, delta = call.y[:, :128].contiguous(), torch.randn(BY_TOKEN_LIMIT, 128).to(DEVICE, torch.float16)
    wanted = plain(swiglu)(y, delta).double()
    assert error(on_gpu(swiglu)(y, delta), wanted) < TOLERANCE
    assert (error(on_gpu(swiglu)(y, 2 * delta), wanted) < 0.02) is (tokens > BY_TOKEN_LIMIT)


@pytest.mark.parametrize("part", [0, 2])
def test_shrink_among_parts(call: Call, part: int) -> None:
    """A rank's share of h lies among zeros, where there is an adapter: shares of all ranks sum to all of h."""
    arguments = (call.x, *call.factors, *call.work(), SITES, 8, 3, part)
    found, wanted = (run(*arguments).unflatten(1, (3, 3, 8)) for run in (on_gpu(grouped), plain(grouped)))
    own = plain(lora_shrink)(call.x, *call.factors, SITES, 8).unflatten(1, (3, 8))
    is_written = own != 0
    assert error(wanted[:, part][is_written], own[is_written].double()) < TOLERANCE
    assert error(found[:, part][is_written], own[is_written].double()) < TOLERANCE
    for other in {0, 1, 2} - {part}:
        assert not found[:, other][is_written].any()
        assert not wanted[:, other].any()


def test_expand_in_place(call: Call) -> None:
    h = torch.randn(call.case.tokens, 24, device=DEVICE)
    runs = (on_gpu(lora_expand_), plain(lora_expand_))
    found, wanted = results = [call.y.clone() for _ in runs]
    for y, run in zip(results, runs, strict=True):
        run(y, h, *call.bank, *call.work(), SITES, call.case.out_features, 1)
    assert error(found, wanted.double()) < TOLERANCE
    assert not error(call.y, wanted.double()) < 0.02


def test_cache_write() -> None:
    torch.manual_seed(0)
    stores = [torch.randn(2, 4, 2, 9, 8, device=DEVICE) for _ in range(2)]
    k, v = torch.randn(2, 4, 2, 1, 8, device=DEVICE).unbind()
    lengths = torch.tensor([0, 5, 2, 8], device=DEVICE)
    stores[1].copy_(stores[0])
    for (keys, values), run in zip(stores, (on_gpu(cache_write_), plain(cache_write_)), strict=True):
        before = keys.clone()
        assert run(keys, values, k, v, lengths) is None
        assert not torch.equal(keys, before)
    assert torch.equal(*stores)


class Rotation:
    """Arguments of rotations: 4 heads of q and 2 of k and v, 8 columns each, in a cache of 2 layers' memory."""

    def __init__(self, call: Call, dim: int = 8, dtype: torch.dtype = torch.float16) -> None:
        self.rows = 5 if call.case.tokens % 5 == 0 else 1
        seq = call.case.tokens // self.rows
        y = torch.randn(self.rows, seq, 8 * dim)
        cos, sin = torch.randn(2, 1, seq, dim).unbind()
        self.y, self.cos, self.sin = (x.to(DEVICE, dtype) for x in (y, cos, sin))
        self.cache = torch.randn(2, self.rows, 2, seq + 4, dim).to(DEVICE, dtype)
        self.lengths = torch.tensor([0, 4, 2, 1, 3], device=DEVICE)[: self.rows]

    def run(self, operator: Callable[..., Any], *lora: Any) -> tuple[Tensor, Tensor]:
        """(q, the cache)."""
        cache = self.cache.clone()
        q: Tensor = operator(self.y, self.cos, self.sin, *cache.unbind(), self.lengths, 4, 2, *lora)
        return q, cache


@pytest.mark.parametrize(
    ("dim", "dtype"), [(8, torch.float16), (7, torch.float16), (8, torch.float32)], ids=["served", "odd", "float32"]
)
def test_rotate_and_cache(call: Call, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel is not for is served by PyTorch's operators; the rest has the same bits in the interpreter."""
    from bdlora_compile.runtime.kernels import launch_rotary

    is_odd = dim % 2 > 0
    if is_odd or dtype is torch.float32:
        monkeypatch.setattr(launch_rotary, "rotate", None)
    rotation = Rotation(call, dim, dtype)
    found, cache = rotation.run(on_gpu(rotate_and_cache))
    wanted, wanted_cache = rotation.run(plain(rotate_and_cache))
    if DEVICE.type == "cpu":
        assert torch.equal(found, wanted)
        assert torch.equal(cache, wanted_cache)
    assert error(found, wanted.double()) < TOLERANCE
    assert error(cache, wanted_cache.double()) < TOLERANCE
    assert found.stride() == wanted.stride()
    assert not torch.equal(cache, rotation.cache)


@pytest.mark.parametrize(("batch", "seq"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_tokens_rotate_and_cache_nothing(batch: int, seq: int, dtype: torch.dtype) -> None:
    y, angle = torch.ones(batch, seq, 64).to(DEVICE, dtype), torch.ones(1, seq, 8).to(DEVICE, dtype)
    keys, values = torch.ones(2, batch, 2, 4, 8).to(DEVICE, dtype).unbind()
    lengths = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    for operator in (on_gpu(rotate_and_cache), plain(rotate_and_cache)):
        assert operator(y, angle, angle, keys, values, lengths, 4, 2).shape == (batch, 4, seq, 8)
        assert keys.eq(1).all()


@pytest.mark.parametrize("tokens", [5, 20])
def test_rotate_and_cache_with_delta(tokens: int) -> None:
    """Of few tokens it is added, of many it is not read."""
    rotation = Rotation(Call(tokens))
    delta = torch.randn(BY_TOKEN_LIMIT, 64).to(DEVICE, torch.float16)
    found, cache = rotation.run(on_gpu(rotate_and_cache), delta)
    wanted, wanted_cache = rotation.run(plain(rotate_and_cache), delta)
    without, cache_without = rotation.run(plain(rotate_and_cache))
    assert error(found, wanted.double()) < TOLERANCE
    assert error(cache, wanted_cache.double()) < TOLERANCE
    assert (not error(found, without.double()) < 0.02) is (tokens <= BY_TOKEN_LIMIT)
    assert (not error(cache, cache_without.double()) < 0.02) is (tokens <= BY_TOKEN_LIMIT)


def test_a_norm_behind_a_sum_over_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large for one kernel: the sum, then the kernel that adds and norms."""
    from bdlora_compile.runtime import norm_op

    class Alone:
        """A process group of one rank."""

        def size(self) -> int:
            return 1

    monkeypatch.setattr(norm_op, "group_named", lambda _: Alone())
    monkeypatch.setattr(norm_op, "all_reduce", lambda x, *_: x)
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, 4, 32, device=DEVICE).unbind()
    weight = torch.rand(32, device=DEVICE)
    memory = torch.zeros(8, dtype=torch.uint8, device=DEVICE)
    arguments = (x, residual, weight, memory, memory, 1e-5, 0, 0, "group")
    run = on_gpu(all_reduce_add_norm) if DEVICE.type == "cpu" else all_reduce_add_norm._backend_fns["cuda"]
    for found, wanted in zip(run(*arguments), plain(all_reduce_add_norm)(*arguments), strict=True):
        assert found.shape == (3, 4, 32)
        assert error(found, wanted.double()) < 1e-6
        assert not error(found, 1.01 * wanted.double()) < 1e-6
