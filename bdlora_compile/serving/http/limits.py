"""How long and how large a request's body may be, checked while it arrives."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdlora_compile.serving.http.errors import ApiError


class BodyLimit:
    """ASGI middleware: 413 for a body that is too large, 408 for one that does not come.

    Args:
        app: what it wraps.
        max_bytes: of a body.
        seconds: in which it must have arrived.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with a body that is counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _stated_length(scope) > self._max_bytes:
            await ApiError(413, self._too_large).response(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    @property
    def _too_large(self) -> str:
        return f"body: found more than {self._max_bytes} bytes; send a smaller request"

    def _counted(self, receive: Receive) -> Receive:
        deadline = asyncio.get_running_loop().time() + self._seconds
        size, is_whole = 0, False

        async def counted() -> Message:
            nonlocal size, is_whole
            if is_whole:
                # What follows a body is the client's hanging up: that may take any time.
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"body: found no end after {self._seconds:g} s; send it at once") from None
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise HTTPException(413, self._too_large)
            is_whole = not message.get("more_body", False)
            return message

        return counted


def _stated_length(scope: Scope) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0
