"""Which kernels serve a call: every shape has a plan that fits it, and the table's entries are plans."""

import pytest

from bdlora_compile.runtime.kernels import tiles
from bdlora_compile.runtime.kernels.tiles import Call, OneLaunch, TwoLaunches, default_plan
from bdlora_compile.runtime.kernels.tuned import TUNED

MOST_ELEMENTS = 16384
"""Elements of a tile: 128 a thread with 4 warps; more would leave the registers."""

SHAPES = [(4096, (512, 128, 128)), (512, (4096,)), (8192, (3584, 3584)), (28672, (8192,)), (36, (36, 6))]


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 24, 64, 256])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 256, 257, 4096])
def test_every_call_has_a_default_plan(tokens: int, width: int) -> None:
    """Sizes that Triton takes, tiles that registers hold, and the form that the grouping of tokens goes with."""
    for in_features, out_features in SHAPES:
        plan = default_plan(Call(tokens, in_features, out_features, width))
        if isinstance(plan, OneLaunch):
            assert tokens <= (tiles.BY_TOKEN_LIMIT if width > 4 else 256)
            assert width <= plan.rows <= tiles.NARROW
            assert plan.rows * in_features / (32 * plan.warps) <= 256
            continue
        assert tokens > tiles.BY_TOKEN_LIMIT or width > tiles.NARROW or width * in_features > 8 * 4096
        sizes = (plan.shrink.rows, plan.shrink.depth, plan.expand.rows, plan.expand.columns)
        assert all(size & (size - 1) == 0 for size in sizes)
        assert plan.shrink.rows * plan.shrink.depth <= MOST_ELEMENTS * plan.shrink.warps // 4
        assert plan.expand.rows * plan.expand.columns <= MOST_ELEMENTS
        if tokens > tiles.BY_TOKEN_LIMIT and not plan.by_token:
            # Tensor cores take at least 16 rows.
            assert min(plan.shrink.rows, plan.expand.rows) >= 16
            assert plan.shrink.splits <= max(1, in_features // 512)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
@pytest.mark.parametrize("width", [1, 3, 8, 16, 64])
def test_tiles_of_a_shrink_beside_a_product(tokens: int, width: int) -> None:
    """Few elements a thread, and no more planes than a reader can sum at once; stages where tokens share a slot."""
    for in_features in (*(shape[0] for shape in SHAPES), 96, 5120, 6144, 14336):
        shrink = tiles.shrink_beside(tokens, in_features, tiles.h_width(width))
        assert -(-in_features // shrink.depth) <= 16
        is_grouped = tiles.segment_tokens(tokens) > 0
        assert (shrink.splits, shrink.stages) == (1, 4 if is_grouped else 1)
        if is_grouped:
            assert shrink.rows * shrink.depth <= 128 * 32 * shrink.warps
            assert shrink.rows <= 16, "what the tensor cores take at least"
            continue
        is_short = tokens * tiles.h_width(width) <= 256
        assert shrink.rows * shrink.depth <= (128 if is_short else 64) * 32 * shrink.warps
        assert shrink.rows <= (8 if is_short else 4), "a sum across the program for each"


@pytest.mark.parametrize(("width", "rows"), [(1, 2), (2, 2), (3, 4), (8, 8), (16, 16), (17, 16), (64, 16), (512, 16)])
def test_a_delta_has_rows_of_b_as_registers_hold(width: int, rows: int) -> None:
    """A power of two up to 128 elements a thread, all at once where ranks are no wider; a thread has all of a column's.

    ``width`` is that of all ranks' shares together.
    """
    expand = tiles.delta_tiles(width)
    assert expand.rows == rows
    assert expand.columns == 8 * 32 * expand.warps, "16 bytes a thread"
    assert (expand.repeat, expand.registers) == (1, 0), "only launches of their own have these"


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 16), (16, 16), (17, 64), (256, 256), (257, 2048), (100000, 2048)])
def test_a_call_takes_the_next_larger_number_of_tokens(tokens: int, bucket: int) -> None:
    assert tiles.bucket_of(tokens) == bucket


@pytest.mark.parametrize("device", TUNED)
def test_the_table_holds_plans_for_its_keys(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for narrow ranks alone; a plan by segment only where tokens are grouped."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    tiles._table.cache_clear()
    try:
        for tokens, in_features, out_features, width in TUNED[device]:
            plan = tiles.plan_for(Call(tokens, in_features, out_features, width))
            if isinstance(plan, OneLaunch):
                assert width <= plan.rows
            else:
                assert isinstance(plan, TwoLaunches)
                assert (plan.shrink.stages > 1) == (tokens > tiles.BY_TOKEN_LIMIT)
        assert tiles.plan_for(Call(16, 24, (24,), 2)) == default_plan(Call(16, 24, (24,), 2))
    finally:
        tiles._table.cache_clear()


def test_an_h100_takes_the_plans_of_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another GPU takes the default."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    key, fields = next((key, fields) for key, fields in TUNED["NVIDIA H200"].items() if len(fields) == 4)
    for device, is_like in (("NVIDIA H100 80GB HBM3", True), ("a GPU that nobody measured", False)):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=device: name)
        tiles._table.cache_clear()
        try:
            assert (tiles.plan_for(Call(*key)) == tiles._plan(*fields)) is is_like
        finally:
            tiles._table.cache_clear()
