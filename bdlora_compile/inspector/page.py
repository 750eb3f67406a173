"""Explanations as one HTML file: template, style, scripts and data in one, so that it opens from disk, offline.

Names in an explanation are untrusted: the template escapes its own, the data is JSON in which ``<`` is written as an
escape, the scripts write text nodes only, and a formula is taken over only if nothing but arithmetic is in it.
"""

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import pydantic
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bdlora_compile.errors import ConfigError
from bdlora_compile.explanation import Explanation
from bdlora_compile.step_formula import NAMES

_SCRIPTS = ("model.js", "dom.js", "compare.js", "graph.js", "tables.js", "chart.js", "app.js")
"""In this order: a file uses what those before it define."""

_KERNELS = re.compile(r"runtime/(?:kernels/)?[a-z_]+\.py")
"""What a node's kernel names as the file that it is written in."""

_ARITHMETIC = re.compile(r"(?:Math\.(?:max|min|ceil|floor)|[A-Za-z]\w*|\d[\d.]*(?:e[+-]?\d+)?|[-+*/%()?:,<>=&|!\s])*")


def render(explanations: Sequence[Explanation], labels: Sequence[str] = ()) -> str:
    """The page of one explanation, or of two side by side.

    Args:
        explanations: one or two.
        labels: what to call them; by default their names.

    Raises:
        ConfigError: a formula of a record that came from a file holds more than arithmetic.
    """
    names = list(labels) or [told.name for told in explanations]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    records = [compact(told) | {"label": name} for told, name in zip(explanations, names, strict=True)]
    sources = {path: _source(path) for path in sorted(set(_KERNELS.findall(json.dumps(records))))}
    return environment.from_string(_text("page.html.j2")).render(
        title=" against ".join(names),
        style=Markup(_text("style.css")),
        scripts=[Markup(_text(name)) for name in _SCRIPTS],
        formulas=[(sorted(told.constants), _functions(told)) for told in explanations],
        data=Markup(_embedded(records)),
        sources=Markup(_embedded(sources)),
    )


def compact(told: Explanation) -> dict[str, Any]:
    """The record for the page: without the graphs' texts, nodes that several stages share written once."""
    record: dict[str, Any] = pydantic.TypeAdapter(Explanation).dump_python(told, mode="json")
    nodes: dict[str, int] = {}
    for graph in record["graphs"]:
        for stage in (*graph["stages"], *graph["base_only"]):
            del stage["text"]
            stage["nodes"] = [nodes.setdefault(json.dumps(node, sort_keys=True), len(nodes)) for node in stage["nodes"]]
    record["nodes"] = [json.loads(text) for text in nodes]
    return record


def _embedded(value: object) -> str:
    """JSON that no parser of HTML mistakes for markup."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _functions(told: Explanation) -> list[tuple[str, Markup]]:
    return [(one.strategy, Markup(_checked(one.javascript, told))) for one in told.formulas]


def _checked(javascript: str, told: Explanation) -> str:
    names = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\d[\d.]*e[+-]?\d+", "", javascript)))
    # The names are ours, not the file's: a record may come from anywhere.
    is_known = names <= {"Math", "max", "min", "ceil", "floor", *NAMES} and told.constants.keys() <= NAMES
    is_markup = "=>" in javascript or "</" in javascript
    if not _ARITHMETIC.fullmatch(javascript) or not is_known or is_markup:
        raise ConfigError(
            f"formula of {told.name}",
            found=f"{javascript:.60}",
            expected="arithmetic in the record's constants",
            remedy="write the record again with `bdlora explain --json`",
        )
    return javascript


def _source(path: str) -> str:
    """One of our own files; a record that came from elsewhere may name files that are none."""
    file = resources.files("bdlora_compile") / path
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _text(name: str) -> str:
    return (resources.files("bdlora_compile") / "inspector" / name).read_text(encoding="utf-8")
