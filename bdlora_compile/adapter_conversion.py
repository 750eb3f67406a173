"""An adapter as a block-diagonal one with G blocks: at each site the nearest there is, by its own singular values.

At a column site block g of G is the rows g of the change of the weight, dW_g = s B_g A [O/G, D], and the blocks are
independent of one another; so the best rank-r B'_g A'_g is the truncated SVD of each dW_g (Eckart-Young). At a row site
the same holds for columns, dW_g = s B A_g. Neither dW nor a block of it is formed: with B_g = Q_b R_b and A = L Q_a^T
the singular values are those of R_b L [R, R].

Legend: D/O in/out features, R rank of the given adapter, G blocks, r = R'/G rank of each block, s scaling.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bdlora_compile.errors import AdapterError, ConfigError
from bdlora_compile.factors import dense_a, dense_b
from bdlora_compile.new_folder import require_new
from bdlora_compile.runtime.adapter_file import Adapter, LoraFactors, read_adapter
from bdlora_compile.sites import Role, Site


@dataclass(frozen=True, slots=True)
class Converted:
    """A site after conversion.

    Attributes:
        site: the layer.
        a, b: the factors as PEFT stores them, one of them packed; their product carries the scaling.
        error: |dW' - dW| / |dW|, Frobenius.
        norm: |dW|, Frobenius.
    """

    site: Site
    a: Tensor
    b: Tensor
    error: float
    norm: float


def convert_site(factors: LoraFactors, site: Site, nblocks: int, rank: int) -> Converted:
    """The nearest block-diagonal factors of rank ``rank`` with ``nblocks`` blocks, in float64.

    Args:
        factors: the site's factors, of any kind.
        site: the layer.
        nblocks: G; it divides ``rank`` and the features that are cut.
        rank: R'.
    """
    a = dense_a(factors, slice(0, site.in_features), site.in_features).double() * factors.scaling
    b = dense_b(factors, slice(0, site.out_features), site.out_features).double()
    if site.role is Role.COLUMN:
        blocks = [_truncated(part, a, rank // nblocks) for part in b.chunk(nblocks, dim=0)]
        new_a, new_b = torch.cat([block.a for block in blocks]), torch.cat([block.b for block in blocks])
    else:
        blocks = [_truncated(b, part, rank // nblocks) for part in a.chunk(nblocks, dim=1)]
        new_a, new_b = torch.cat([block.a for block in blocks]), torch.cat([block.b for block in blocks], dim=1)
    lost, all_of_it = sum(block.lost for block in blocks), sum(block.total for block in blocks)
    # A change of nothing is met exactly.
    error = (lost / all_of_it) ** 0.5 if all_of_it else 0.0
    dtype = factors.a.dtype
    return Converted(site, new_a.to(dtype).contiguous(), new_b.to(dtype).contiguous(), error, all_of_it**0.5)


@dataclass(frozen=True, slots=True)
class _Block:
    """B [O, r] and A [r, D] of a block; squares of the singular values that were left out, and of all."""

    b: Tensor
    a: Tensor
    lost: float
    total: float


def _truncated(b: Tensor, a: Tensor, rank: int) -> _Block:
    """The nearest of rank ``rank`` to b @ a, which is not formed; zeros where b @ a has a lower rank."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    u, values, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    kept = min(rank, values.numel())
    roots = values[:kept].sqrt()
    new_b = torch.nn.functional.pad(q_b @ (u[:, :kept] * roots), (0, rank - kept))
    new_a = torch.nn.functional.pad((roots[:, None] * v[:kept]) @ q_a.t(), (0, 0, 0, rank - kept))
    squares = values.square()
    return _Block(new_b, new_a, float(squares[kept:].sum()), float(squares.sum()))


def convert_adapter(
    adapter: Adapter,
    sites: Mapping[str, Site],
    nblocks: int,
    *,
    rank: int | None = None,
    max_error: float = 0.3,
    progress: Callable[[Converted], None] = lambda _: None,
) -> Sequence[Converted]:
    """Convert all sites of an adapter.

    Args:
        adapter: of any kind.
        sites: the model's sites.
        nblocks: G.
        rank: R' of every site; the adapter's largest rank by default, rounded up to a multiple of G.
        max_error: relative error that no site may exceed; 1 allows everything.
        progress: called after each site.

    Raises:
        ConfigError: G does not divide ``rank`` or a site's features.
        AdapterError: the adapter changes an embedding or holds NaN or infinity, or a site's error is above
            ``max_error``.
    """
    new_rank = rank or -(-adapter.max_rank // nblocks) * nblocks
    _check_divides(adapter, sites, nblocks, new_rank)
    adapter.check_finite()
    done = []
    with adapter.opened():
        for name, factors in adapter.factors.items():
            done.append(convert_site(factors, sites[name], nblocks, new_rank))
            progress(done[-1])
    worst = max(done, key=lambda site: site.error)
    if worst.error > max_error:
        raise AdapterError(
            f"{adapter.source}: {worst.site.name}",
            found=f"relative error {worst.error:.3f} with {nblocks} blocks of rank {new_rank // nblocks}",
            expected=f"at most {max_error:g}",
            remedy=f"choose a larger --rank ({nblocks * adapter.max_rank} is always exact) or fewer blocks, "
            "allow more by --max-error, or train a block-diagonal adapter",
        )
    return done


def total_error(sites: Sequence[Converted]) -> float:
    """Relative error of all sites together."""
    norm = sum(site.norm**2 for site in sites)
    return float((sum((site.error * site.norm) ** 2 for site in sites) / norm) ** 0.5) if norm else 0.0


def write_adapter(sites: Sequence[Converted], nblocks: int, base_model: str | None, out: Path) -> None:
    """Write converted sites in PEFT's format; ``out`` appears whole or not at all.

    Raises:
        ConfigError: something is at ``out`` already.
    """
    require_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tensors = {f"base_model.model.{one.site.name}.lora_A.weight": one.a for one in sites}
        tensors |= {f"base_model.model.{one.site.name}.lora_B.weight": one.b for one in sites}
        save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(_config(sites, nblocks, base_model), indent=2, sort_keys=True)
        (beside / "adapter_config.json").write_text(text + "\n")
        read_adapter(beside, {one.site.name: one.site for one in sites}, base_model=base_model)
        os.chmod(beside, 0o755)  # what mkdtemp made is for its owner alone
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _config(sites: Sequence[Converted], nblocks: int, base_model: str | None) -> dict[str, object]:
    """The scaling is in the factors: alpha is r."""
    rank = sites[0].a.shape[0]
    ends = {role: sorted({_end(one.site) for one in sites if one.site.role is role}) for role in Role}
    names = [one.site.name for one in sites]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "use_bdlora": {
            "nblocks": nblocks,
            "target_modules_bd_a": ends[Role.ROW],
            "target_modules_bd_b": ends[Role.COLUMN],
            "match_strict": True,
        },
    }


def _end(site: Site) -> str:
    return site.name.rpartition(".")[2]


def _check_divides(adapter: Adapter, sites: Mapping[str, Site], nblocks: int, rank: int) -> None:
    if rank % nblocks:
        raise ConfigError(
            "--rank",
            found=str(rank),
            expected=f"a multiple of --nblocks {nblocks}",
            remedy=f"choose {-(-rank // nblocks) * nblocks}",
        )
    for name in adapter.factors:
        site = sites[name]
        if site.is_lookup:
            raise AdapterError(
                f"{adapter.source}: {name}",
                found="LoRA on an embedding",
                expected="linear layers alone: PEFT has no block-diagonal LoRA for embeddings",
                remedy="serve it as the ordinary adapter that it is",
            )
        features = site.out_features if site.role is Role.COLUMN else site.in_features
        if features % nblocks:
            raise ConfigError(
                f"--nblocks {nblocks}",
                found=f"{features} features that blocks cut at {name}",
                expected="a number that the blocks divide",
                remedy="choose another number of blocks",
            )
