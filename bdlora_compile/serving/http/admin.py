"""The routes that change the set of adapters: there with an admin token alone, and behind it."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from bdlora_compile.errors import AdapterError
from bdlora_compile.serving.http.errors import RESPONSES, ApiError, printable
from bdlora_compile.serving.http.protocol import LoadRequest, UnloadRequest
from bdlora_compile.serving.http.service import Service

_LOG = logging.getLogger("bdlora_compile.http")

_ANSWERS: dict[int | str, dict[str, Any]] = {
    **RESPONSES,
    200: {"description": "Done, as a line of text.", "content": {"text/plain": {}, "application/json": {}}},
}


def router(service: Service) -> APIRouter:
    """The routes over a service. One change is made at a time."""
    routes = APIRouter()
    turn = asyncio.Lock()

    @routes.post("/v1/load_lora_adapter", responses=_ANSWERS, response_model=None)
    async def load(body: LoadRequest) -> PlainTextResponse:
        """Make an adapter below the adapter roots known, on all ranks or on none."""
        name = body.lora_name
        if name == service.settings.base_name:
            raise ApiError(400, "lora_name: found the base model's name; choose another one", param="lora_name")
        async with turn:
            if name in service.adapters and not body.load_inplace:
                raise ApiError(
                    400,
                    f"The lora adapter '{name}' has already been loaded; set load_inplace to replace it.",
                    param="lora_name",
                    code="already_loaded",
                )
            folder = _find(service, body.lora_path)
            try:
                info = await asyncio.to_thread(service.engine.load_adapter, name, folder)
            except AdapterError as error:
                raise _refusal(error, "lora_name", service) from None
            service.loaded[name] = int(time.time())
        _LOG.info("loaded adapter %s, version %.12s, rank %d", name, info.version, info.rank)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", responses=_ANSWERS, response_model=None)
    async def unload(body: UnloadRequest) -> PlainTextResponse:
        """Forget an adapter; its rows finish, its waiting requests end with an error."""
        name = body.lora_name
        async with turn:
            if name not in service.adapters:
                raise ApiError(
                    404,
                    f"The lora adapter '{printable(name[:80])}' cannot be found.",
                    param="lora_name",
                    code="model_not_found",
                )
            await asyncio.to_thread(service.engine.unload_adapter, name)
            service.loaded.pop(name, None)
            service.metrics.forget(name)
        _LOG.info("unloaded adapter %s", name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return routes


def _find(service: Service, path: str) -> Path:
    """The folder of a path below an adapter root, given from there or from the root of the machine, as vLLM's are."""
    roots = [root.rstrip("/") for root in service.settings.adapter_roots]
    below = next((path[len(root) + 1 :] for root in roots if path.startswith(root + "/")), path)
    try:
        return service.roots.find(below)
    except AdapterError as error:
        raise _refusal(error, "lora_path", service) from None


def _refusal(error: AdapterError, param: str, service: Service) -> ApiError:
    """400; the paths of the roots are not told."""
    message = str(error)
    for root in service.settings.adapter_roots:
        message = message.replace(str(Path(root).resolve()), "<root>").replace(root.rstrip("/"), "<root>")
    return ApiError(400, message, param=param, code="invalid_adapter")
