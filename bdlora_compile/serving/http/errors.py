"""Every error of the server in OpenAI's form, and the HTTP status of each error of ours."""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from bdlora_compile.errors import (
    AdapterError,
    AgreementError,
    BdloraError,
    EngineClosedError,
    LostRankError,
    QueueFullError,
    RequestError,
    UnknownAdapterError,
)

_MAX_TEXT = 1000


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: for the client's developer.
        param: the field of the request that it is about.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = ErrorResponse(
            error=ErrorDetail(message=printable(message), type=_kind(status), param=param, code=code)
        )

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


RESPONSES: dict[int | str, dict[str, object]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served as it is."},
    "5XX": {"model": ErrorResponse, "description": "The server cannot serve now."},
}
"""What every route may answer besides its own."""


def printable(text: str) -> str:
    """Text that a client sent, safe in a log line and in JSON: no control characters, no surrogates, not endless."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:_MAX_TEXT])
    return shown + ("..." if len(text) > _MAX_TEXT else "")


def api_error(error: BdloraError) -> ApiError:
    """The answer to a request that the engine or the adapters refuse."""
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.where, code="invalid_value")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, AdapterError):
        return ApiError(400, str(error), code="invalid_adapter")
    if isinstance(error, EngineClosedError | LostRankError | AgreementError):
        return ApiError(503, str(error), code="unavailable")
    return ApiError(500, str(error), code="internal")


def failed_request(error: BdloraError | None) -> ApiError:
    """The answer to a request that was accepted and did not end well; None: it was cancelled by the server."""
    if error is None:
        return ApiError(503, "the server shuts down; send the request to another replica", code="unavailable")
    # Whatever was wrong with it was not seen when it was accepted: not the client's fault.
    return ApiError(500, str(error), code="failed") if isinstance(error, RequestError) else api_error(error)


def install(app: FastAPI) -> None:
    """Let an application answer with OpenAI's errors, whoever raises them."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response

    async def family(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, BdloraError)
        return api_error(error).response

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette logs it with its trace; the client learns nothing of the inside.
        return ApiError(500, "the server failed to answer; its log says why", code="internal").response

    for kind, handler in (
        (ApiError, ours),
        (BdloraError, family),
        (RequestValidationError, invalid),
        (HTTPException, http),
        (Exception, unexpected),
    ):
        app.add_exception_handler(kind, handler)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by the name of its field."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(place) or "body"
    unknown = first["type"] == "extra_forbidden"
    message = f"{field}: this server knows no such field; leave it out" if unknown else f"{field}: {first['msg']}"
    code = "unknown_field" if unknown else "invalid_value"
    return ApiError(400, message, param=printable(place[0]) if place else None, code=code)


def _kind(status: int) -> str:
    kinds = {
        HTTPStatus.UNAUTHORIZED: "authentication_error",
        HTTPStatus.NOT_FOUND: "not_found_error",
        HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    }
    return kinds.get(HTTPStatus(status), "invalid_request_error" if status < 500 else "server_error")
