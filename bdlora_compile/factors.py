"""Which part of an adapter's factors each rank holds at a site, for both layouts and for every kind of adapter.

Legend: D/O in/out features, R adapter rank, G blocks of a block-diagonal factor, N tensor-parallel degree,
k this rank, M pieces of the split dim, r local rank, c blocks kept packed.  y = W x + s B (A x), A [R, D], B [O, R].

    layout  site    A_loc                      B_loc                       between them
    local   column  r rows                     [O/M, r], own output rows   nothing
    local   row     [r, own D/N columns]       [O, r]                      nothing (the base all-reduce sums)
    slora   column  [R/N, D]                   [O/M, R], own output rows   all-gather of A x
    slora   row     [R, own D/N columns]       [O/N, R], own output rows   all-reduce of A x

Local rank r (column; a row site is the same with A and B exchanged):

    G = cM                     own c blocks, kept packed: r = R/M
    M = cG                     own part of one block: r = R/G
    neither divides            union of the blocks that the slice overlaps, zero elsewhere: R/G < r <= R
    ordinary (G = 1)           r = R

The two sites of the vocabulary V are cut into N pieces of ceil(V / N) features: read D/N or O/M so, the features past V
are zero. An embedding is a row site with one-hot x; its A_loc is kept transposed, a row of r for each token id.

Sources: S-LoRA arXiv 2311.03285 figure 4; BD-LoRA arXiv 2510.23346; the last three rows follow by linearity.
"""

from dataclasses import dataclass
from enum import Enum

import torch

from bdlora_compile.placement import Mesh, Shard, shard_slice, site_pieces
from bdlora_compile.runtime.adapter_file import FactorKind, LoraFactors
from bdlora_compile.sites import Role, Site


class Layout(Enum):
    """How the LoRA factors of a site lie on the ranks; decided once per model, when it is loaded."""

    LOCAL = "local"
    SLORA = "slora"


@dataclass(frozen=True, slots=True)
class LocalShape:
    """Shapes of one rank's factors at a site: A [a_rank, D_loc / a_blocks], B transposed [b_rank, O_loc / b_blocks].

    At an embedding A is transposed too: [D_loc, a_rank].

    Attributes:
        a_rank, b_rank: rows of each factor; they differ only where a gather lies between (slora, column).
        a_blocks, b_blocks: c of each factor; at most one of them is above 1.
        in_features: columns of x on this rank, D_loc.
        out_features: columns of y that B writes on this rank, O_loc.
        out_start: first column of y that B writes.
    """

    a_rank: int
    b_rank: int
    a_blocks: int
    b_blocks: int
    in_features: int
    out_features: int
    out_start: int = 0

    @property
    def a_numel(self) -> int:
        """Elements of A on this rank."""
        return self.a_rank * self.in_features // self.a_blocks

    @property
    def b_numel(self) -> int:
        """Elements of B on this rank."""
        return self.b_rank * self.out_features // self.b_blocks


@dataclass(frozen=True, slots=True)
class LocalFactors:
    """One rank's factors at a site, in the layout of the pool: ``a`` and transposed ``b``, blocks stacked on rows.

    ``a`` is transposed at an embedding.
    """

    shape: LocalShape
    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Cut:
    """The half-open range of features of the split dim that this rank owns, and the blocks that it overlaps.

    ``length`` is what every rank's range is padded to; ``aligned`` says that the range is made of whole blocks.
    """

    start: int
    stop: int
    length: int
    first_block: int
    num_blocks: int
    aligned: bool


def local_features(site: Site, layout: Layout, mesh: Mesh) -> tuple[int, int]:
    """(D_loc, O_loc): the columns of x that A reads and of y that B writes, the same on every rank.

    Raises:
        PlacementError: the mesh does not divide the site.
    """
    own = _padded_length(site, mesh)
    if site.role is Role.COLUMN:
        return site.in_features, own
    if layout is Layout.LOCAL:
        return own, site.out_features
    # The last ranks' slices may be short of O: columns past it are zero and are cut off again by `out_start`.
    return own, _slora_row_outputs(site, mesh)


def local_shape(factors: LoraFactors, site: Site, layout: Layout, rank: int, mesh: Mesh) -> LocalShape:
    """Shapes of the factors that ``rank`` holds, without reading them."""
    d_loc, o_loc = local_features(site, layout, mesh)
    if layout is Layout.SLORA:
        share = -(-factors.rank // mesh.size)
        if site.role is Role.COLUMN:
            return LocalShape(share, share * mesh.size, 1, 1, d_loc, o_loc)
        return LocalShape(factors.rank, factors.rank, 1, 1, d_loc, o_loc, rank * o_loc)
    if not _is_aligned_kind(factors, site):
        return LocalShape(factors.rank, factors.rank, 1, 1, d_loc, o_loc)
    cut = _cut(factors, site, rank, mesh)
    r = cut.num_blocks * factors.rank // factors.nblocks
    packed = cut.num_blocks if cut.aligned else 1
    if site.role is Role.COLUMN:
        return LocalShape(r, r, 1, packed, d_loc, o_loc)
    return LocalShape(r, r, packed, 1, d_loc, o_loc)


def rank_capacity(max_rank: int, site: Site, layout: Layout, mesh: Mesh) -> int:
    """Columns of h = A x on one rank that any adapter of rank ``max_rank`` fits in, the same on every rank."""
    if layout is Layout.SLORA and site.role is Role.COLUMN:
        return -(-max_rank // mesh.size)
    return max_rank


def read_local(factors: LoraFactors, site: Site, layout: Layout, rank: int, mesh: Mesh) -> LocalFactors:
    """What ``rank`` holds, in the layout of the pool; views of the adapter's tensors where nothing is put together.

    Of a file only the pages that are copied from a view are read.
    """
    shape = local_shape(factors, site, layout, rank, mesh)
    if layout is Layout.SLORA:
        a, b = _read_slora(factors, site, shape, rank, mesh)
    elif not _is_aligned_kind(factors, site):
        a, b = _read_ordinary(factors, site, shape, rank, mesh)
    else:
        a, b = _read_blocks(factors, site, rank, mesh)
    return LocalFactors(shape, a.t() if site.is_lookup else a, b)


def dense_a(factors: LoraFactors, columns: slice, in_features: int) -> torch.Tensor:
    """A [R, D] restricted to ``columns``, zeros written out where it is stored packed; else a view."""
    if factors.kind is not FactorKind.BLOCK_A:
        return factors.a.view()[:, columns]
    return _unpack(factors, in_features)[:, columns]


def dense_b(factors: LoraFactors, rows: slice, out_features: int) -> torch.Tensor:
    """B [O, R] restricted to ``rows``, zeros written out where it is stored packed; else a view."""
    if factors.kind is not FactorKind.BLOCK_B:
        return factors.b.view()[rows]
    rank, width = factors.rank, factors.rank // factors.nblocks
    packed = factors.b.view()[rows]
    height = out_features // factors.nblocks
    block = torch.arange(rows.start, rows.stop) // height
    dense = packed.new_zeros(packed.shape[0], rank)
    columns = block[:, None] * width + torch.arange(width)
    return dense.scatter_(1, columns, packed)


def _unpack(factors: LoraFactors, in_features: int) -> torch.Tensor:
    packed = factors.a.view()
    width, height = in_features // factors.nblocks, factors.rank // factors.nblocks
    dense = packed.new_zeros(factors.rank, in_features)
    columns = (torch.arange(factors.rank) // height * width)[:, None] + torch.arange(width)
    return dense.scatter_(1, columns, packed)


def _is_aligned_kind(factors: LoraFactors, site: Site) -> bool:
    """Whether the blocks lie on the dim that tensor parallelism splits (else the adapter is served as ordinary)."""
    wanted = FactorKind.BLOCK_B if site.role is Role.COLUMN else FactorKind.BLOCK_A
    return factors.kind is wanted


def _owned(site: Site, rank: int, mesh: Mesh) -> slice:
    """Features of the split dim that ``rank`` owns; short or empty at the end of a vocabulary."""
    part = shard_slice((site.split_features,), Shard(0, site_pieces(site, mesh)), rank, mesh)
    return slice(part.start, part.stop)


def _padded_length(site: Site, mesh: Mesh) -> int:
    """Features of the split dim on every rank; those past a short piece are zero."""
    return -(-site.split_features // site_pieces(site, mesh))


def _cut(factors: LoraFactors, site: Site, rank: int, mesh: Mesh) -> _Cut:
    own, length = _owned(site, rank, mesh), _padded_length(site, mesh)
    size = site.split_features // factors.nblocks
    first, last = own.start // size, -(-own.stop // size)
    num_blocks = last - first if own.stop > own.start else 0
    aligned = own.start % size == 0 and own.stop - own.start == length == num_blocks * size
    return _Cut(own.start, own.stop, length, first, num_blocks, aligned)


def _read_blocks(factors: LoraFactors, site: Site, rank: int, mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Own blocks of a factor whose blocks lie on the split dim."""
    cut = _cut(factors, site, rank, mesh)
    height = factors.rank // factors.nblocks
    ranks = slice(cut.first_block * height, (cut.first_block + cut.num_blocks) * height)
    if site.role is Role.COLUMN:
        return factors.a.view()[ranks], _stack_b(factors.b.view()[cut.start : cut.stop], cut, factors, site)
    b = factors.b.view()[:, ranks].t()
    return _stack_a(factors, ranks, cut, site), b


def _stack_b(packed: torch.Tensor, cut: _Cut, factors: LoraFactors, site: Site) -> torch.Tensor:
    """Rows of packed B [O_loc, R/G] as transposed blocks [r, O_loc / c]; a union of blocks is written out."""
    if cut.aligned:
        blocks = packed.unflatten(0, (cut.num_blocks, -1)).transpose(1, 2)
        return blocks.flatten(0, 1)
    if cut.num_blocks == 0:
        return packed.new_zeros(0, cut.length)
    packed = _pad_rows(packed, cut.length)
    if cut.num_blocks == 1:
        return packed.t()
    width = factors.rank // factors.nblocks
    # Padding belongs to no block: its zeros may be written anywhere.
    block = torch.arange(cut.start, cut.start + cut.length) // (site.out_features // factors.nblocks) - cut.first_block
    block = block.clamp(max=cut.num_blocks - 1)
    dense = packed.new_zeros(packed.shape[0], cut.num_blocks * width)
    return dense.scatter_(1, block[:, None] * width + torch.arange(width), packed).t()


def _stack_a(factors: LoraFactors, ranks: slice, cut: _Cut, site: Site) -> torch.Tensor:
    """Rows of packed A [r, D/G] as blocks [r, D_loc / c]; a part or a union of blocks is cut out or written out."""
    if cut.aligned:
        return factors.a.view()[ranks]
    width = site.in_features // factors.nblocks
    offset = cut.first_block * width
    if cut.num_blocks == 1:
        return factors.a.view()[ranks, cut.start - offset : cut.stop - offset]
    packed = factors.a.view()[ranks]
    height = factors.rank // factors.nblocks
    union = packed.new_zeros(packed.shape[0], cut.num_blocks * width)
    columns = (torch.arange(packed.shape[0]) // height * width)[:, None] + torch.arange(width)
    return union.scatter_(1, columns, packed)[:, cut.start - offset : cut.stop - offset]


def _read_ordinary(
    factors: LoraFactors, site: Site, shape: LocalShape, rank: int, mesh: Mesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """One factor whole (replicated by choice), the other cut on the split dim."""
    own = _owned(site, rank, mesh)
    if site.role is Role.COLUMN:
        a = dense_a(factors, slice(0, site.in_features), site.in_features)
        return a, _pad_rows(dense_b(factors, own, site.out_features), shape.out_features).t()
    a = _pad_columns(dense_a(factors, own, site.in_features), shape.in_features)
    return a, dense_b(factors, slice(0, site.out_features), site.out_features).t()


def _read_slora(
    factors: LoraFactors, site: Site, shape: LocalShape, rank: int, mesh: Mesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """S-LoRA's cut; ranks that R does not fill, and outputs that O does not fill, are zero rows."""
    own = _owned(site, rank, mesh)
    if site.role is Role.COLUMN:
        rows = slice(min(rank * shape.a_rank, factors.rank), min((rank + 1) * shape.a_rank, factors.rank))
        a = _pad_rows(dense_a(factors, slice(0, site.in_features), site.in_features)[rows], shape.a_rank)
        b = _pad_rows(dense_b(factors, own, site.out_features), shape.out_features).t()
        return a, _pad_rows(b, shape.b_rank)
    a = _pad_columns(dense_a(factors, own, site.in_features), shape.in_features)
    start = min(shape.out_start, site.out_features)
    stop = min(shape.out_start + shape.out_features, site.out_features)
    b = dense_b(factors, slice(start, stop), site.out_features)
    return a, _pad_rows(b, shape.out_features).t()


def _pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - tensor.shape[0]
    return torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])]) if missing else tensor


def _pad_columns(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    missing = columns - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _slora_row_outputs(site: Site, mesh: Mesh) -> int:
    return -(-site.out_features // mesh.size)
