"""API keys: who may use the server."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from randlora.errors import ConfigError
from randlora.serve.errors import error_answer

_OPEN = "/health"
"""The path that needs no key, as in vLLM: what watches a server has none."""


class Keys:
    """Keys of which a request must have one. They are kept as digests, so that nothing can print them."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Take the keys.

        Raises:
            ConfigError: if there is none, or a header cannot hold one. The message does not name the key.
        """
        if not keys or not all(key and all("!" <= letter <= "~" for letter in key) for key in keys):
            raise ConfigError(
                "an API key (--api-key, RANDLORA_API_KEY) is empty, or has blanks or letters outside of ASCII: take "
                "another, or none to serve without"
            )
        self._digests = [_digest(key.encode()) for key in keys]

    def admit(self, authorization: str) -> bool:
        """Return whether a request with this header may pass."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip().encode("latin-1"))
        # all are compared, each in constant time, so that the time tells nothing about the keys
        same = [secrets.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(same)


class RequireKey:
    """An application that refuses requests without a key, before it reads their bodies."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with 401."""
        asked = scope["type"] == "http" and scope["path"] != _OPEN
        if not asked or self._keys.admit(Headers(scope=scope).get("Authorization", "")):
            await self._app(scope, receive, send)
            return
        answer = error_answer(401, "this server needs an API key: Authorization: Bearer KEY", "invalid_api_key")
        answer.headers["WWW-Authenticate"] = "Bearer"
        await answer(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
