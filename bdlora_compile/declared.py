"""What the owner of a hand-written parallel model says of its LoRA factors: the licence to rewrite its graph.

A graph shows which collectives it has, not what its weights may ever be. So nothing is removed because of what a tensor
happens to hold: its owner declares what stays true of it, and a look at the data may only refuse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdlora_compile.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """The whole factor is block-diagonal: ``nblocks`` equal blocks, zero outside them."""

    nblocks: int

    def __str__(self) -> str:
        return f"block-diagonal with {self.nblocks} blocks"


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds the same values."""

    def __str__(self) -> str:
        return "the same on every rank"


Declaration = BlockDiagonal | Replicated


def declare_block_diagonal(target: nn.Module | Tensor, nblocks: int) -> None:
    """Say that the LoRA factor of which ``target`` is this rank's slice is block-diagonal, now and later.

    For a layer that is split by columns (q, k, v, gate, up) declare B [O, R], for one that is split by rows (o, down)
    declare A [R, D]. The slices are S-LoRA's: of B this rank's O/N rows and all R columns, of A all R rows and this
    rank's D/N columns. ``torch.compile(model, backend="bdlora")`` then computes with the rank's own blocks alone and
    removes the collective between the factors. A call after a later write to the tensor raises.

    Args:
        target: the parameter, or a module that owns just one matrix (``nn.Linear``).
        nblocks: blocks of the whole factor, over all ranks.

    Raises:
        ConfigError: there is no such matrix, or ``nblocks`` is not a positive number.
    """
    if not isinstance(nblocks, int) or isinstance(nblocks, bool) or nblocks < 1:
        raise ConfigError(
            "declare_block_diagonal(nblocks=...)",
            found=repr(nblocks),
            expected="a whole number of at least 1",
            remedy="give the number of blocks over all ranks, as the adapter was trained",
        )
    _declare(_matrix(target, "declare_block_diagonal"), BlockDiagonal(nblocks))


def declare_replicated(target: nn.Module | Tensor) -> None:
    """Say that every rank holds the same values in ``target``, now and later.

    Args:
        target: the parameter, or a module that owns just one matrix.

    Raises:
        ConfigError: there is no such matrix.
    """
    _declare(_matrix(target, "declare_replicated"), Replicated())


def declaration_of(value: object) -> Declaration | None:
    """What the owner of a tensor declared of it, None if nothing."""
    found = getattr(value, "bdlora_declared", None)
    return found if isinstance(found, (BlockDiagonal, Replicated)) else None


def _declare(matrix: Tensor, declaration: Declaration) -> None:
    before = declaration_of(matrix)
    if before is not None and before != declaration:
        raise ConfigError(
            "declaration of a LoRA factor",
            found=f"a tensor that was declared {before} before",
            expected=f"the same again, not {declaration}",
            remedy="declare a factor once",
        )
    matrix.bdlora_declared = declaration  # type: ignore[attr-defined]  # read back by `declaration_of`


def _matrix(target: nn.Module | Tensor, call: str) -> Tensor:
    matrices = [target] if isinstance(target, torch.Tensor) else [p for p in target.parameters() if p.ndim == 2]
    if len(matrices) == 1 and matrices[0].ndim == 2:
        return matrices[0]
    found = f"a tensor of {matrices[0].ndim} dims" if isinstance(target, torch.Tensor) else f"{len(matrices)} matrices"
    raise ConfigError(
        f"{call}({type(target).__name__})",
        found=found,
        expected="one matrix: a parameter, or a module that owns just one",
        remedy="pass the factor's own parameter",
    )
