"""Where the values of a graph live on the ranks of a tensor-parallel mesh.

Legend: N ranks, k this rank, M pieces (M = N, or M < N with each piece held by N/M neighbouring ranks).
"""

from collections.abc import Collection
from dataclasses import dataclass

from bdlora_compile.errors import PlacementError
from bdlora_compile.sites import Role, Site


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks that share one model.

    Attributes:
        size: N, the tensor-parallel degree.
        group: name of the process group, as functional collectives want it.
    """

    size: int
    group: str = ""


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank holds a summand of the whole shape; the value is their sum."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True, slots=True)
class RankLocal:
    """Every rank holds a value of its own; nothing is known of how they belong together (graphs that others wrote)."""

    def __str__(self) -> str:
        return "L"


@dataclass(frozen=True, slots=True)
class Shard:
    """The value is cut on one dim; rank k of N holds piece k * pieces // N.

    Attributes:
        dim: the dim that is cut, counted from 0.
        pieces: M, the number of equal pieces.
    """

    dim: int
    pieces: int

    def piece_of(self, rank: int, mesh: Mesh) -> int:
        """The piece that ``rank`` holds."""
        return rank * self.pieces // mesh.size

    def __str__(self) -> str:
        return f"S{self.dim}/{self.pieces}"


Placement = Replicate | Partial | RankLocal | Shard


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a tensor that one rank reads: ``tensor[..., start:stop, ...]`` on ``dim``, zero-filled to ``length``.

    ``dim`` None is the whole tensor.
    """

    dim: int | None
    start: int = 0
    stop: int = 0
    length: int = 0


def shard_slice(shape: tuple[int, ...], placement: Placement, rank: int, mesh: Mesh) -> Slice:
    """The slice of a parameter of ``shape`` that ``rank`` holds; a dim that does not divide is padded with zeros.

    Raises:
        PlacementError: the placement is Partial or RankLocal, which no stored tensor has.
    """
    match placement:
        case Replicate():
            return Slice(None)
        case Shard(dim, pieces):
            length = -(-shape[dim] // pieces)
            start = min(placement.piece_of(rank, mesh) * length, shape[dim])
            return Slice(dim, start, min(start + length, shape[dim]), length)
        case Partial() | RankLocal():
            raise PlacementError(
                f"parameter of shape {shape}",
                found=f"placement {placement} (no part of one whole tensor)",
                expected="a whole value or a slice",
                remedy="report this: a pass gave a stored tensor a partial placement",
            )


def local_shape(shape: tuple[int, ...], placement: Placement) -> tuple[int, ...]:
    """The shape of what every rank holds of a value of ``shape``, padded to the same on all ranks."""
    if not isinstance(placement, Shard):
        return shape
    dim, pieces = placement.dim, placement.pieces
    return (*shape[:dim], -(-shape[dim] // pieces), *shape[dim + 1 :])


def site_pieces(site: Site, mesh: Mesh) -> int:
    """M for the split dim of ``site``: N, or the number of its heads where that is a divisor of N.

    A vocabulary is cut into N pieces whatever its size: the last ones may be short.

    Raises:
        PlacementError: neither of heads and N divides the other, or a row site would be held more than once.
    """
    check_split([site], mesh)
    return mesh.size if site.vocabulary else min(mesh.size, site.num_units)


def check_split(sites: Collection[Site], mesh: Mesh, model: str = "") -> None:
    """Refuse a mesh that cannot share all of ``sites``; the error names the degrees that can.

    ``model`` says in words which model it is.

    Raises:
        PlacementError: a site cannot be split over the ranks.
    """
    for site in sites:
        if _can_split(site, mesh.size):
            continue
        what = "heads" if site.unit > 1 else "features"
        degrees = [str(degree) for degree in range(1, 65) if all(_can_split(one, degree) for one in sites)]
        raise PlacementError(
            site.name,
            found=f"{site.num_units} {what} on the dim that {mesh.size} ranks split{model and f' of {model}'}",
            expected=f"{what} that the tensor-parallel degree {mesh.size} divides",
            remedy=f"choose a degree among {', '.join(degrees)}",
        )


def _can_split(site: Site, degree: int) -> bool:
    units = site.num_units
    if site.vocabulary or units % degree == 0:
        return True
    # Fewer kv heads than ranks: neighbouring ranks hold the same head. A row site may not be held twice,
    # since its partial results are summed over all ranks.
    return degree % units == 0 and site.role is Role.COLUMN
