"""Whether the data of declared factors is what their owner declared, on every rank: a look that can only refuse."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from bdlora_compile.collectives import ALL_REDUCE, WAIT
from bdlora_compile.dataflow import SCALINGS, linear_reach
from bdlora_compile.declared import Replicated
from bdlora_compile.errors import AgreementError
from bdlora_compile.foreign.paths import ColumnPath, Licence, LinearPath, Path, RowPath, path_name
from bdlora_compile.ir import ArgumentWeight, operator_name, record, set_record, stage_nodes
from bdlora_compile.placement import Replicate
from bdlora_compile.runtime.agreement import Agreement


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one rank says of a path.

    Attributes:
        path: its name.
        refusal: why this rank refuses it, empty if it does not.
        alike: what must be the same on every rank: a digest of a whole factor, or how the path is arranged.
    """

    path: str
    refusal: str
    alike: str


def refused_paths(
    graph: Graph,
    paths: Sequence[Path],
    tensors: Mapping[int, Tensor],
    beside_dtensors: bool,
    agreement: Agreement,
) -> dict[str, str]:
    """Why paths may not be rewritten, by name; the same on every rank.

    Factors and numbers that turn out to be the same on every rank are marked replicated, for `fold`.

    Args:
        graph: the graph that they are part of.
        paths: what the tag pass found.
        tensors: this rank's parameters, by the index of their argument.
        beside_dtensors: whether the model has DTensors: who sharded it then left plain parameters whole on every rank.
        agreement: of the ranks that share the graph.

    Raises:
        AgreementError: ranks found different paths.
    """
    own = [_verdict(path, tensors, beside_dtensors) for path in paths]
    scalings = _scalings_of_sums(graph)
    numbers = [
        repr((operator_name(node), [arg for arg in node.args if not isinstance(arg, Node)])) for node in scalings
    ]
    text = json.dumps([numbers, [(verdict.path, verdict.refusal, verdict.alike) for verdict in own]])
    answers = [json.loads(answer) for answer in agreement.exchange("LoRA paths", text)]
    refused: dict[str, str] = {}
    for rank, (_, entries) in enumerate(answers):
        verdicts = [_Verdict(*entry) for entry in entries]
        _require_same_paths(own, verdicts, rank)
        for mine, verdict in zip(own, verdicts, strict=True):
            if verdict.refusal:
                refused.setdefault(verdict.path, f"on rank {rank}: {verdict.refusal}" if rank else verdict.refusal)
            elif verdict.alike != mine.alike:
                refused.setdefault(verdict.path, f"rank {rank} has another factor, scale or arrangement than this rank")
    whole = [
        path.product.parameter for path in paths if isinstance(path, LinearPath) and path_name(path) not in refused
    ]
    for node in (*whole, *(scalings if all(other == numbers for other, _ in answers) else ())):
        set_record(node, placement=Replicate())
    return refused


def _scalings_of_sums(graph: Graph) -> list[Node]:
    """Nodes that multiply the result of an all-reduce, or what is linear in it, by a number; in graph order."""
    waits = [node for node in stage_nodes(graph, WAIT) if operator_name(node.all_input_nodes[0]) == ALL_REDUCE]
    reached = {node for wait in waits for node in linear_reach(wait)[0]}
    # Beyond a product with a factor too: PEFT scales B (A x).
    for product in [node for node in graph.nodes if operator_name(node) == "mm" and reached & {*node.all_input_nodes}]:
        reached |= {*linear_reach(product)[0]}
    return [node for node in graph.nodes if node in reached and operator_name(node) in SCALINGS]


def _verdict(path: Path, tensors: Mapping[int, Tensor], beside_dtensors: bool) -> _Verdict:
    match path:
        case ColumnPath():
            # A rank computes with its own parts alone.
            return _Verdict(path_name(path), _contradiction(path.licence, tensors), "")
        case RowPath():
            arranged = (path.second_columns, path.second_rank_dim, path.landing.value, path.features_first, path.scale)
            return _Verdict(path_name(path), _contradiction(path.licence, tensors), repr(arranged))
        case LinearPath(product):
            source = record(product.parameter).source
            assert isinstance(source, ArgumentWeight), "a path's factors are parameters"
            is_whole = isinstance(record(product.parameter).placement, Replicate)
            if is_whole or beside_dtensors or isinstance(source.declared, Replicated):
                return _Verdict(path_name(path), "", _digest(tensors[source.index]))
            reason = f"nothing says that every rank holds the same {source.parameter} (declare_replicated)"
            return _Verdict(path_name(path), reason, "")


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
