"""What a server says about itself: its models, its health, its metrics."""

import asyncio
import time

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from bdlora_compile.errors import BdloraError
from bdlora_compile.serving.http.errors import RESPONSES
from bdlora_compile.serving.http.service import Service, model_card


def models_router(service: Service) -> APIRouter:
    """The base model, and each adapter as a model of its own with the base model as its parent."""
    routes = APIRouter()
    base = service.settings.base_name

    def card(name: str) -> dict[str, object]:
        parent = None if name == base else base
        found = dict(model_card(name, parent, base, service.loaded.get(name, service.created)))
        return found | {"max_model_len": service.settings.max_length}

    @routes.get("/v1/models", responses=RESPONSES)
    async def models() -> dict[str, object]:
        """All models."""
        return {"object": "list", "data": [card(name) for name in (base, *service.adapters.names)]}

    @routes.get("/v1/models/{model:path}", responses=RESPONSES)
    async def model(model: str) -> dict[str, object]:
        """One model."""
        service.adapter_of(model)
        return card(model)

    return routes


def state_router(service: Service) -> APIRouter:
    """``/health`` and ``/metrics``, for machines."""
    routes = APIRouter()
    health = _Health(service)

    @routes.get(
        "/health",
        responses={503: {"description": "The server drains, or its engine has failed."}},
        response_class=JSONResponse,
    )
    async def healthy() -> JSONResponse:
        """Whether a step ran on all ranks in the last seconds."""
        problem = await health.problem()
        body = {"status": "ok"} if problem is None else {"status": problem}
        return JSONResponse(body, 200 if problem is None else 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return routes


class _Health:
    """Runs a step, at most one at a time and not more often than settings say."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._turn = asyncio.Lock()
        self._checked = float("-inf")

    async def problem(self) -> str | None:
        """What is wrong; None if a step ran lately."""
        if (found := self._known_problem()) is not None:
            return found
        async with self._turn:
            if time.monotonic() - self._checked > self._service.settings.health_seconds:
                try:
                    await asyncio.to_thread(self._service.engine.check)
                except BdloraError:
                    return self._known_problem() or "failed"
                self._checked = time.monotonic()
        return self._known_problem()

    def _known_problem(self) -> str | None:
        if self._service.engine.failed is not None:
            return "failed"
        return "draining" if self._service.is_draining else None
