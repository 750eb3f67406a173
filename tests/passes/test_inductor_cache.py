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


def compiled_result(schema: str, columns: int = 4) -> Tensor:
    """Of a graph that calls an operator of ours with this signature, compiled as a process of its own would.

    The operator gives ``columns`` twos.
    """
    torch._dynamo.reset()
    with torch.library._scoped_library("bdlora", "FRAGMENT") as library:
        library.define(f"probe{schema}")
        library.impl("probe", lambda x, unused=0: (2 * x + unused)[:columns], "CompositeExplicitAutograd")
        torch.library.register_fake("bdlora::probe", lambda x, unused=0: x.new_empty(columns), lib=library)
        graph = Graph()
        x = graph.placeholder("x")
        probe = graph.call_function(torch.ops.bdlora.probe.default, (x,))
        probe.meta["example_value"] = torch.empty(columns, device="meta")
        graph.output((probe,))
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


def test_nor_is_that_of_operators_with_other_results() -> None:
    assert compiled_result(NEW, columns=3).shape == (3,)
    assert compiled_result(NEW, columns=2).shape == (2,)
    before = hits()
    assert compiled_result(NEW, columns=3).shape == (3,)
    assert hits() > before


def test_without_their_results_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the code holds results against the shape that they had."""
    monkeypatch.setattr(inductor, "type_text", lambda _: "")
    compiled_result(NEW, columns=3)
    with pytest.raises(AssertionError, match="expected size 2==3"):
        compiled_result(NEW, columns=2)


def test_without_the_signatures_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the code spells out an argument that is there no more."""
    monkeypatch.setattr(inductor, "_cache_key_tag", lambda _: "")
    compiled_result(OLD)
    with pytest.raises(RuntimeError, match=r"probe\(\)"):
        compiled_result(NEW)
