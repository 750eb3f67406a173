"""Every rank's local factors, put together as the two layouts say, equal the dense product in float64."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdlora_compile.factors import Layout, LocalFactors, local_shape, rank_capacity, read_local
from bdlora_compile.placement import Mesh, Shard, site_pieces
from bdlora_compile.runtime.adapter_file import FactorKind, LoraFactors
from bdlora_compile.runtime.adapter_tensors import MemoryTensor
from bdlora_compile.sites import Role, Site

TOLERANCE = 1e-12
"""Sums of at most 32 x 16 products of order one in float64: rounding is 1e-14 at most."""


@st.composite
def cases(draw: st.DrawFn, lined_up: bool = False) -> tuple[Site, LoraFactors, Mesh, Tensor]:
    """A site, an adapter of any kind on it (or one whose blocks are whole on each rank), ranks, and the dense B A."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    role = draw(st.sampled_from(list(Role)))
    heads = ranks * draw(st.sampled_from([1, 2, 3])) if lined_up else draw(st.sampled_from([1, 2, 3, 4, 8, 12, 24]))
    vocabulary = not lined_up and draw(st.booleans())
    split = heads * draw(st.sampled_from([2, 4, 6])) + (draw(st.integers(0, 5)) if vocabulary else 0)
    other = draw(st.sampled_from([5, 8, 12]))
    blocks = ranks * draw(st.sampled_from([1, 2])) if lined_up else draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    rank = blocks * draw(st.integers(1, 3))
    wanted = FactorKind.BLOCK_B if role is Role.COLUMN else FactorKind.BLOCK_A
    kind = wanted if lined_up else draw(st.sampled_from(list(FactorKind)))
    wide, tall = (other, split) if role is Role.COLUMN else (split, other)
    site = Site("site", role, wide, tall, unit=1 if vocabulary else split // heads, vocabulary=vocabulary)
    mesh = Mesh(ranks)
    assume(vocabulary or heads % ranks == 0 or (role is Role.COLUMN and ranks % heads == 0))
    assume(kind is FactorKind.DENSE or not site.is_lookup)
    assume(kind is FactorKind.DENSE or (wide if kind is FactorKind.BLOCK_A else tall) % blocks == 0)
    if kind is FactorKind.DENSE:
        blocks = 1
    torch.manual_seed(draw(st.integers(0, 1000)))
    a = torch.randn(rank, wide // (blocks if kind is FactorKind.BLOCK_A else 1), dtype=torch.float64)
    b = torch.randn(tall, rank // (blocks if kind is FactorKind.BLOCK_B else 1), dtype=torch.float64)
    factors = LoraFactors("site", kind, rank, blocks, 1.0, MemoryTensor("a", a, "test"), MemoryTensor("b", b, "test"))
    dense_a = torch.block_diag(*a.chunk(blocks)) if kind is FactorKind.BLOCK_A else a
    dense_b = torch.block_diag(*b.chunk(blocks)) if kind is FactorKind.BLOCK_B else b
    return site, factors, mesh, dense_b @ dense_a


def shrink(site: Site, local: LocalFactors, x: Tensor) -> Tensor:
    """A x with the blocks of A stacked on its rows."""
    blocks = (local.a.t() if site.is_lookup else local.a).chunk(local.shape.a_blocks)
    return torch.cat([part @ block.t() for part, block in zip(x.chunk(len(blocks), -1), blocks, strict=True)], -1)


def expand(local: LocalFactors, h: Tensor) -> Tensor:
    """B h with the blocks of transposed B stacked on its rows."""
    blocks = local.b.chunk(local.shape.b_blocks)
    return torch.cat([part @ block for part, block in zip(h.chunk(len(blocks), -1), blocks, strict=True)], -1)


def delta(site: Site, layout: Layout, mesh: Mesh, ranks: list[LocalFactors], x: Tensor) -> Tensor:
    """What all ranks together add to the site's output."""
    pieces = site_pieces(site, mesh)
    is_column = site.role is Role.COLUMN
    length = -(-site.in_features // pieces)
    padded = torch.nn.functional.pad(x, (0, length * pieces - site.in_features))
    own_x = [x if is_column else padded[:, rank * length : (rank + 1) * length] for rank in range(mesh.size)]
    h = [shrink(site, local, part) for local, part in zip(ranks, own_x, strict=True)]
    if layout is Layout.SLORA:
        h = [torch.cat(h, -1) if is_column else torch.stack(h).sum(0)] * mesh.size
    parts = [expand(local, part) for local, part in zip(ranks, h, strict=True)]
    if is_column:
        # Ranks that hold the same piece agree; one of each is kept.
        whole = torch.cat([parts[piece * mesh.size // pieces] for piece in range(pieces)], -1)
        assert not whole[:, site.out_features :].any(), "what pads a vocabulary is zero"
        return whole[:, : site.out_features]
    if layout is Layout.LOCAL:
        return torch.stack(parts).sum(0)
    return torch.cat(parts, -1)[..., : site.out_features]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(cases(), st.sampled_from(list(Layout)))
def test_ranks_together_equal_the_dense_product(case: tuple[Site, LoraFactors, Mesh, Tensor], layout: Layout) -> None:
    site, factors, mesh, dense = case
    ranks = [read_local(factors, site, layout, rank, mesh) for rank in range(mesh.size)]
    for rank, local in enumerate(ranks):
        assert local.shape == local_shape(factors, site, layout, rank, mesh)
        assert local.a.numel() == local.shape.a_numel
        assert local.b.numel() == local.shape.b_numel
        assert local.shape.a_rank <= rank_capacity(factors.rank, site, layout, mesh)
    x = torch.randn(3, site.in_features, dtype=torch.float64)
    found = delta(site, layout, mesh, ranks, x)
    assert (found - x @ dense.t()).abs().max() < TOLERANCE * max(1.0, float(dense.abs().max()))


@settings(max_examples=60, deadline=None)
@given(cases(lined_up=True))
def test_blocks_that_ranks_divide_are_held_once(case: tuple[Site, LoraFactors, Mesh, Tensor]) -> None:
    """G = cN with blocks on the split dim: the ranks' bytes add up to the adapter's, and all ranks hold the same."""
    site, factors, mesh, _ = case
    shapes = [local_shape(factors, site, Layout.LOCAL, rank, mesh) for rank in range(mesh.size)]
    whole = torch.Size(factors.a.shape).numel() + torch.Size(factors.b.shape).numel()
    assert {shape.a_numel + shape.b_numel for shape in shapes} == {whole // mesh.size}
    assert whole % mesh.size == 0


def test_a_block_shifted_by_one_is_noticed() -> None:
    """The twin: rank k with the factors of rank k + 1 gives another product."""
    torch.manual_seed(0)
    site, mesh = Site("site", Role.COLUMN, 8, 16, unit=4), Mesh(4)
    a, b = torch.randn(8, 8, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    factors = LoraFactors(
        "site", FactorKind.BLOCK_B, 8, 4, 1.0, MemoryTensor("a", a, "test"), MemoryTensor("b", b, "test")
    )
    ranks = [read_local(factors, site, Layout.LOCAL, (rank + 1) % 4, mesh) for rank in range(4)]
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = x @ (torch.block_diag(*b.chunk(4)) @ a).t()
    assert (delta(site, Layout.LOCAL, mesh, ranks, x) - expected).abs().max() > 0.1


def test_pieces_held_twice_are_the_same_on_both_ranks() -> None:
    """Fewer kv heads than ranks."""
    site, mesh = Site("site", Role.COLUMN, 8, 8, unit=4), Mesh(4)
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    factors = LoraFactors(
        "site", FactorKind.DENSE, 4, 1, 1.0, MemoryTensor("a", a, "test"), MemoryTensor("b", b, "test")
    )
    ranks = [read_local(factors, site, Layout.LOCAL, rank, mesh) for rank in range(4)]
    assert Shard(0, 2).piece_of(1, mesh) == 0
    assert torch.equal(ranks[0].b, ranks[1].b)
    assert not torch.equal(ranks[1].b, ranks[2].b)
