"""``bdlora serve``: the base model and its adapters behind OpenAI's routes."""

from pathlib import Path
from typing import Annotated

import typer

from bdlora_compile.commands.common import StrategyName, check_model, checked_adapters, launch, refuse
from bdlora_compile.commands.run import InnerName


def serve(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or an id on the hub.")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="A PEFT adapter's folder.")] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Tensor-parallel degree: processes that are started (1).")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The port (8000); 0 takes a free one.")] = None,
    served_name: Annotated[str | None, typer.Option(help="Name of the base model in requests.")] = None,
    adapter_root: Annotated[
        list[str] | None, typer.Option(help="Folder below which the admin routes find adapters.")
    ] = None,
    max_adapters: Annotated[int | None, typer.Option(min=1, help="Adapters on the device at once.")] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Largest adapter rank.")] = None,
    max_local_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of factors on one rank; max-rank / TP if all are BD.")
    ] = None,
    target_module: Annotated[
        list[str] | None, typer.Option(help="Layer that adapters may change, like q_proj; all by default.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Requests that run at once (16).")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and completion (2048).")] = None,
    strategy: Annotated[StrategyName | None, typer.Option(help="As in bdlora run (local).")] = None,
    inner: Annotated[InnerName | None, typer.Option(help="Default: inductor on GPUs, eager on CPUs.")] = None,
    config: Annotated[
        Path | None, typer.Option(dir_okay=False, help="A TOML file with these and more settings; flags win.")
    ] = None,
) -> None:
    """Serve the model and its adapters over HTTP on TP ranks: each adapter is a model of its own name.

    Routes: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics. With BDLORA_ADMIN_TOKEN in the
    environment also /v1/load_lora_adapter and /v1/unload_lora_adapter, for those who send it; with BDLORA_API_KEY all
    of /v1 asks for that key. SIGTERM drains: running requests end, then the processes. docs/serving.md says more.

    Example: bdlora serve ./SmolLM2 --tp 3 --adapter pirate=examples/adapters/pirate --port 8000
    """
    check_model(model)
    adapters = checked_adapters(adapter)
    try:
        from bdlora_compile.errors import ConfigError  # importing torch takes seconds
        from bdlora_compile.serving.http.settings import ServeSettings, Tokens
    except ModuleNotFoundError as error:
        refuse(
            f"bdlora serve: found no package {error.name}, expected those of the extra serve; "
            "run in a checkout: pip install -e '.[serve]'"
        )
    flags = {
        "model": model,
        "adapters": {name: str(path) for name, path in adapters.items()},
        "tp": tp,
        "host": host,
        "port": port,
        "served_name": served_name,
        "adapter_roots": adapter_root or None,
        "max_adapters": max_adapters,
        "max_rank": max_rank,
        "max_local_rank": max_local_rank,
        "target_modules": target_module or None,
        "max_rows": max_rows,
        "max_length": max_length,
        "strategy": strategy.value if strategy else None,
        "inner": inner.value if inner else None,
    }
    try:
        settings = ServeSettings.of(config, flags)
        Tokens.of_environment()
    except ConfigError as error:
        refuse(f"error: {error}")
    arguments = ["--settings", settings.model_dump_json()]
    # Ranks drain by themselves; the launcher kills what is left a little later.
    patience = int(settings.drain_timeout + settings.step_timeout) + 10
    raise typer.Exit(launch("bdlora_compile.serving.http.server", arguments, settings.tp, stop_seconds=patience))
