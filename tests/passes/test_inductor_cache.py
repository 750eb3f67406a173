"""Code that torch keeps on disk: found again for the same operators, and not for those that have changed since."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bdlora_compile import inductor
from bdlora_compile.inductor import compile_flat

NEW, OLD = "(Tensor x) -> Tensor", "(Tensor x, int unused=0) -> Tensor"


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    with fresh_cache():
        yield


def twice(x: Tensor, unused: int = 0) -> Tensor:
    return 2 * x + unused


def compiled_result(schema: str) -> Tensor:
    """Of a graph that calls an operator of ours with this signature, compiled as a process of its own would."""
    torch._dynamo.reset()
    with torch.library._scoped_library("bdlora", "FRAGMENT") as library:
        library.define(f"probe{schema}")
        library.impl("probe", twice, "CompositeExplicitAutograd")
        torch.library.register_fake("bdlora::probe", torch.empty_like, lib=library)
        graph = Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.ops.bdlora.probe.default, (x,)),))
        value = torch.ones(4)
        with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
            run = compile_flat(GraphModule({}, graph), [value])
        (result,) = run(value)
    assert isinstance(result, Tensor)
    return result


def hits() -> int:
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def test_code_of_former_operators_is_not_taken() -> None:
    before = hits()
    for schema in (OLD, NEW):
        assert torch.equal(compiled_result(schema), torch.full((4,), 2.0))
    assert hits() == before
    assert torch.equal(compiled_result(NEW), torch.full((4,), 2.0))
    assert hits() > before


def test_without_the_signatures_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the code spells out an argument that is there no more."""
    monkeypatch.setattr(inductor, "_cache_key_tag", lambda _: "")
    compiled_result(OLD)
    with pytest.raises(RuntimeError, match=r"probe\(\)"):
        compiled_result(NEW)
