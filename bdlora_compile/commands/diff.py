"""``bdlora diff``: what differs between two explanations, and whether CI shall accept it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bdlora_compile.commands.common import check_output, refuse


class Part(StrEnum):
    """What to show."""

    comm = "comm"


class Rule(StrEnum):
    """What makes the exit status 1; as `comparing.Forbidden`, whose import would take seconds."""

    new_collective = "new-collective"
    lora_collective = "lora-collective"
    gather_fallback = "gather-fallback"


def diff(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="Of bdlora explain --json, or of a run's report.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="What is compared with it.")],
    only: Annotated[Part | None, typer.Option(help="comm: collectives alone.")] = None,
    fail_on: Annotated[
        list[Rule] | None, typer.Option(help="Exit with status 1 if B has it; may be given several times.")
    ] = None,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write both, side by side, as one page.")] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write what differs, field by field.")] = None,
) -> None:
    """Compare two records: collectives of the compiled graphs, and nodes of each stage by their stable key.

    Exit status 0 whatever differs, 1 if --fail-on forbids something that B has, 2 for files that are no records.

    In CI, against the record that the last release wrote:

    \b
      bdlora explain --config llama-3.1-8b --tp 4 --nblocks 4 --json new.json
      bdlora diff released.json new.json --only comm --fail-on new-collective --fail-on lora-collective
    """
    check_output(html, "--html")
    check_output(json, "--json")
    from bdlora_compile.comparing import RULES, compare  # importing torch takes seconds
    from bdlora_compile.comparison_text import show
    from bdlora_compile.errors import ConfigError
    from bdlora_compile.explanation import Explanation
    from bdlora_compile.inspector.page import render

    try:
        told = [Explanation.read(path) for path in (first, second)]
        found = compare(told[0], told[1], [RULES[rule.value] for rule in fail_on or []])
        if html is not None:
            html.write_text(render(told, [first.stem, second.stem]), encoding="utf-8")
    except ConfigError as error:
        refuse(f"error: {error}")
    console = Console()
    show(found, console if console.is_terminal else Console(width=160), only_comm=only is Part.comm)
    if json is not None:
        json.write_text(found.to_json(), encoding="utf-8")
    for path in (html, json):
        if path is not None:
            typer.echo(f"written to {path}")
    if found.violations:
        raise typer.Exit(1)
