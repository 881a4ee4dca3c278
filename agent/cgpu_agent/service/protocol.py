"""uvicorn's HTTP protocol with the bounds it lacks: how many connections, how long a silent or deaf one stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedProtocol(H11Protocol):
    """One connection.

    Args:
        limit: connections above this number are cut at once.
        patience: seconds within which a request's header must be complete, from connect or from the last answer, and
            within which answers that piled up must begin to be read.
        arguments: uvicorn's.
    """

    def __init__(self, *, limit: int, patience: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limit = limit
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._unread = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self._limit:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering and not self._unread:
            self._wait_no_more()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = True
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = False
        if self._answering:
            self._wait_no_more()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering:
            self._wait()

    @property
    def _answering(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        return cycle is not None and not cycle.response_complete

    def _wait(self) -> None:
        self._wait_no_more()
        self._timer = self.loop.call_later(self._patience, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def bounded_protocol(limit: int, patience: float) -> Callable[..., asyncio.Protocol]:
    """What uvicorn makes its protocols by; see ``BoundedProtocol``."""
    return partial(BoundedProtocol, limit=limit, patience=patience)
