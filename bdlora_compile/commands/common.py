"""What several commands share: checks of their arguments, and starting one process a rank."""

import dataclasses
import sys
import uuid
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console

from bdlora_compile.errors import ConfigError


class StrategyName(StrEnum):
    """How LoRA factors lie on the ranks."""

    local = "local"
    slora = "slora"
    auto = "auto"


def launch(module: str, arguments: Sequence[str], processes: int, stop_seconds: int = 30) -> int:
    """Run a module in ``processes`` processes, as torchrun does; returns the exit status of the first to fail.

    A process says itself what went wrong; the launcher's own trace of a failed child would hide it. SIGTERM and SIGINT
    are passed on to the processes, which then have ``stop_seconds`` to end (30 in torch releases that cannot be told).
    Refused in a process of torchrun: each would start all of them again, beside one another on the same GPUs.
    """
    from torch.distributed import is_torchelastic_launched
    from torch.distributed.elastic.multiprocessing.api import SignalException  # importing torch takes seconds
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if is_torchelastic_launched():
        refuse("bdlora: found a process of torchrun, expected a shell: bdlora starts its --tp processes by itself")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        **_stop_option(stop_seconds),
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    except SignalException:
        # They were asked to end, and did.
        return 0
    return 0


def _stop_option(seconds: int) -> dict[str, Any]:
    from torch.distributed.launcher.api import LaunchConfig

    known = any(field.name == "shutdown_timeout" for field in dataclasses.fields(LaunchConfig))
    return {"shutdown_timeout": seconds} if known else {}


def refuse(message: str) -> NoReturn:
    """End with status 2 and one line on stderr."""
    Console(stderr=True).print(message, markup=False)
    raise typer.Exit(2)


def check_output(path: Path | None, option: str) -> None:
    """What is written at the end must have a folder at the beginning: the work between would be lost."""
    if path is not None and not path.parent.is_dir():
        refuse(f"{option} {path}: found no folder {path.parent}, expected one that exists; create it")


def check_model(model: str) -> None:
    """A path must be a folder; anything of the form ``name`` or ``owner/name`` may be on the hub."""
    looks_like_a_path = model.count("/") > 1 or model.startswith((".", "~", "/"))
    if looks_like_a_path and not Path(model).is_dir():
        refuse(f"{model}: found no such folder, expected a Hugging Face model folder or an id on the hub")


def parse_adapters(pairs: Sequence[str]) -> dict[str, Path]:
    """Folders by name, from what ``--adapter NAME=PATH`` said each time.

    Raises:
        ConfigError: one is not NAME=PATH of a folder, or two have one name.
    """
    folders: dict[str, Path] = {}
    for pair in pairs:
        name, path = _parse_adapter(pair)
        if name in folders:
            raise ConfigError(
                f"--adapter {name!r}",
                found=f"two folders, {folders[name]} and {path}",
                expected="one folder for each name",
                remedy="rename one",
            )
        folders[name] = path
    return folders


def checked_adapters(pairs: Sequence[str] | None) -> dict[str, Path]:
    """`parse_adapters` of a command's option; what is wrong ends the command."""
    try:
        return parse_adapters(pairs or [])
    except ConfigError as error:
        refuse(str(error))


def _parse_adapter(pair: str) -> tuple[str, Path]:
    name, separator, path = pair.partition("=")
    if separator and name and Path(path).is_dir():
        return name, Path(path)
    if not separator:
        found, remedy = "no =", f"write NAME={pair}"
    elif not Path(path).is_dir():
        found, remedy = f"no folder {path}", "check the path"
    else:
        found, remedy = "no name", f"write NAME={path}"
    raise ConfigError(
        f"--adapter {pair!r}",
        found=found,
        expected="NAME=PATH of a folder that PEFT's save_pretrained wrote",
        remedy=remedy,
    )
