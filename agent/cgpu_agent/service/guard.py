"""The outermost layer of the application: headers on every answer, a count, and nothing of what went wrong inside."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_JUDGED: Final = 422
"""The one refusal that comes after the whole body was read."""


class Guard:
    """ASGI middleware.

    Args:
        app: what answers.
        count: told the status of every answer, and the path it was for.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                self._count(scope["path"], status)
                message["headers"] = [*message["headers"], *_HEADERS]
                if status >= 400 and status != _JUDGED:
                    # What is left of the body nobody will read: without this a sender could go on for ever.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, guarded)
        except ClientDisconnect:
            log.debug("client went away")
        except Exception as error:  # noqa: BLE001 - its text may hold anything; its name and place are what helps
            frames = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-6:]]
            log.critical("failed", extra={"fields": {"error": type(error).__name__, "frames": " ".join(frames)}})
