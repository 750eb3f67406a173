"""The web application: routes, who may use them, limits, errors."""

from fastapi import Depends, FastAPI

from bdlora_compile.serving.http import admin, errors, generation, state
from bdlora_compile.serving.http.auth import bearer
from bdlora_compile.serving.http.limits import BodyLimit
from bdlora_compile.serving.http.service import Service
from bdlora_compile.version import __version__


def build(service: Service) -> FastAPI:
    """The application over a service.

    ``/v1`` asks for the API key if there is one, the admin routes for the admin token; they are not there without one.
    ``/health`` and ``/metrics`` are open: what they say is for the operator's own network.
    """
    app = FastAPI(title="bdlora_compile", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes, seconds=service.settings.body_timeout)
    users = [Depends(bearer(service.tokens.api_key, "ApiKey"))]
    app.include_router(generation.router(service), dependencies=users)
    app.include_router(state.models_router(service), dependencies=users)
    app.include_router(state.state_router(service))
    if service.tokens.admin_token is not None:
        admins = [Depends(bearer(service.tokens.admin_token, "AdminToken"))]
        app.include_router(admin.router(service), dependencies=admins)
    return app
