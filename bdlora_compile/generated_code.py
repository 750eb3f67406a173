"""The code that Inductor made of each region, with the lines that come from each node."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import Graph

from bdlora_compile.explanation import GeneratedCode
from bdlora_compile.ir import node_key
from bdlora_compile.nodes import short_file
from bdlora_compile.regions import Regions

_MOST = 300_000
"""Characters of a region's code that a report keeps: reports are pages of less than 5 MB."""
_SOURCES = re.compile(r"Source Nodes: \[([^\]]*)\]")
_FOLDER = re.compile(r"(?<![\w)\]./])/(?:[\w.@+~-]+/)+[\w.@+~-]+")


@dataclass(slots=True)
class CodeOfRegion:
    """Collects what Inductor writes for one region.

    Attributes:
        region: what to call it.
        layers: paths of the layers that it is run for; none outside layers.
        is_base_only: whether it is part of the graph for batches without adapters.
        names: key of each node, by its name in the region's graph.
        texts: modules of code, in the order of compilation.
    """

    region: str
    layers: Sequence[str]
    is_base_only: bool
    names: dict[str, str]
    texts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, graph: Graph, region: str, layers: Sequence[str] = (), *, is_base_only: bool = False) -> "CodeOfRegion":
        """An empty collection for a graph that is about to be compiled."""
        calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        return cls(region, layers, is_base_only, {node.name: node_key(node) for node in calls if node_key(node)})

    def record(self) -> GeneratedCode:
        """What a report keeps of it: no folder of the machine."""
        text = _FOLDER.sub(lambda found: short_file(found[0]), "\n".join(self.texts))
        if len(text) > _MOST:
            text = f"{text[:_MOST]}\n# ... and {len(text) - _MOST} characters more"
        lines: dict[str, list[int]] = {key: [] for key in self.names.values()}
        for number, line in enumerate(text.splitlines(), start=1):
            found = _SOURCES.search(line)
            for name in found[1].split(", ") if found else ():
                if name in self.names:
                    lines[self.names[name]].append(number)
        return GeneratedCode(self.region, self.layers, self.is_base_only, text, lines)


def code_of(regions: Regions, *, is_base_only: bool) -> list[CodeOfRegion]:
    """An empty collection for each region of a graph."""
    collections = []
    for index, module in enumerate(regions.modules):
        runs = [step for step in regions.steps if step.region == index]
        layers = [regions.label(step) for step in runs if step.layer is not None]
        collections.append(CodeOfRegion.of(module.graph, regions.label(runs[0]), layers, is_base_only=is_base_only))
    return collections
