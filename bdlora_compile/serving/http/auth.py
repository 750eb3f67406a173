"""Bearer tokens."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from bdlora_compile.serving.http.errors import ApiError


def bearer(token: SecretStr | None, name: str) -> Callable[..., Awaitable[None]]:
    """A dependency of routes: 401 unless the request brings ``token``. None lets everybody in.

    Args:
        token: what is expected.
        name: of the scheme, for the OpenAPI document.
    """
    if token is None:
        return _anybody
    expected = token.get_secret_value().encode()
    scheme = HTTPBearer(auto_error=False, scheme_name=name)

    async def check(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        given = b"" if credentials is None else credentials.credentials.encode("utf-8", "surrogateescape")
        # Takes the same time wherever the two differ.
        if not hmac.compare_digest(given, expected):
            raise ApiError(
                401,
                "Authorization: found no valid bearer token; send the one that the operator gave you",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


async def _anybody() -> None:
    return None
