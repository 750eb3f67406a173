"""Whether the data of declared factors is what their owner declared, on every rank: a look that can only refuse."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bdlora_compile.declared import Replicated
from bdlora_compile.errors import AgreementError
from bdlora_compile.foreign.paths import Licence, LinearPath, Path, path_name
from bdlora_compile.ir import ArgumentWeight, record, set_record
from bdlora_compile.placement import Replicate
from bdlora_compile.runtime.agreement import Agreement


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one rank says of a path.

    Attributes:
        path: its name.
        refusal: why this rank refuses it, empty if it does not.
        digest: of a factor that must be the same on every rank, empty for others.
    """

    path: str
    refusal: str
    digest: str


def refused_paths(
    paths: Sequence[Path], tensors: Mapping[int, Tensor], beside_dtensors: bool, agreement: Agreement
) -> dict[str, str]:
    """Why paths may not be rewritten, by name; the same on every rank.

    Args:
        paths: what the tag pass found.
        tensors: this rank's parameters, by the index of their argument.
        beside_dtensors: whether the model has DTensors: who sharded it then left plain parameters whole on every rank.
        agreement: of the ranks that share the graph.

    Raises:
        AgreementError: ranks found different paths.
    """
    own = [_verdict(path, tensors, beside_dtensors) for path in paths]
    text = json.dumps([(verdict.path, verdict.refusal, verdict.digest) for verdict in own])
    answers = [[_Verdict(*entry) for entry in json.loads(other)] for other in agreement.exchange("LoRA paths", text)]
    refused: dict[str, str] = {}
    for rank, verdicts in enumerate(answers):
        _require_same_paths(own, verdicts, rank)
        for mine, verdict in zip(own, verdicts, strict=True):
            if verdict.refusal:
                refused.setdefault(verdict.path, f"on rank {rank}: {verdict.refusal}" if rank else verdict.refusal)
            elif verdict.digest != mine.digest:
                refused.setdefault(verdict.path, f"rank {rank} holds another second factor than this rank")
    for path in paths:
        if isinstance(path, LinearPath) and path_name(path) not in refused:
            set_record(path.product.parameter, placement=Replicate())
    return refused


def _verdict(path: Path, tensors: Mapping[int, Tensor], beside_dtensors: bool) -> _Verdict:
    if not isinstance(path, LinearPath):
        return _Verdict(path_name(path), _contradiction(path.licence, tensors), "")
    source = record(path.product.parameter).source
    assert isinstance(source, ArgumentWeight), "a path's factors are parameters"
    is_whole = isinstance(record(path.product.parameter).placement, Replicate)
    if not (is_whole or beside_dtensors or isinstance(source.declared, Replicated)):
        reason = f"nothing says that every rank holds the same {source.parameter} (declare_replicated)"
        return _Verdict(path_name(path), reason, "")
    return _Verdict(path_name(path), "", _digest(tensors[source.index]))


def _contradiction(licence: Licence, tensors: Mapping[int, Tensor]) -> str:
    source = record(licence.parameter).source
    assert isinstance(source, ArgumentWeight), "a path's factors are parameters"
    tensor = tensors[source.index]
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return ""
    if tensor.is_inference():
        return f"{licence.name} was made in inference mode, where later writes cannot be noticed"
    size = tensor.shape[licence.rank_dim]
    outside = [
        tensor.detach().narrow(licence.rank_dim, 0, licence.start),
        tensor.detach().narrow(licence.rank_dim, licence.stop, size - licence.stop),
    ]
    if any(bool(part.count_nonzero()) for part in outside):
        return (
            f"{licence.name} was declared block-diagonal, but holds other values than zero outside places "
            f"{licence.start}:{licence.stop} of dim {licence.rank_dim}"
        )
    return ""


def _digest(tensor: Tensor) -> str:
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return ""
    data = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def _require_same_paths(own: Sequence[_Verdict], other: Sequence[_Verdict], rank: int) -> None:
    mine, theirs = [verdict.path for verdict in own], [verdict.path for verdict in other]
    if mine != theirs:
        raise AgreementError(
            f"LoRA paths of rank {rank}",
            found=", ".join(theirs) or "none",
            expected=f"those of this rank: {', '.join(mine) or 'none'}",
            remedy="run the same model on every rank",
        )
