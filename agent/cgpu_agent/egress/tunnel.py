"""Copies bytes both ways between two sockets, within bounds. What the bytes are, it never looks at."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.egress.config import Limits
from cgpu_agent.errors import Exhausted

CHUNK: Final = 64 << 10
"""Bytes held of each direction: no more is read before they are written."""

Way = Literal["sent", "received"]


@dataclass(slots=True)
class Tally:
    """Bytes so far: ``sent`` to the world, ``received`` from it."""

    sent: int = 0
    received: int = 0


class Tunnel:
    """The agent's connection (``inner``) and one to the world (``outer``); non-blocking, the caller's to close."""

    def __init__(self, inner: socket.socket, outer: socket.socket, limits: Limits, tally: Tally) -> None:
        self._inner: Final = inner
        self._outer: Final = outer
        self._limits: Final = limits
        self._tally: Final = tally
        self._moved = time.monotonic()

    async def run(self) -> None:
        """Copy until both sides have ended.

        Raises:
            Exhausted: ``IDLE``, ``TOTAL_TIME``, ``SENT_BYTES`` or ``RECEIVED_BYTES``.
            OSError: a connection broke.
        """
        copies = (
            asyncio.ensure_future(self._copy(self._inner, self._outer, "sent", self._limits.sent_bytes)),
            asyncio.ensure_future(self._copy(self._outer, self._inner, "received", self._limits.received_bytes)),
        )
        tasks = (asyncio.gather(*copies), asyncio.ensure_future(self._watch()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            # The copies, too: a gathering that one of them ended has let go of the other. It would wait on a socket
            # that is closed, and the next one with that number would never be heard.
            for task in (*tasks, *copies):
                task.cancel()
            await asyncio.gather(*tasks, *copies, return_exceptions=True)

    async def _copy(self, source: socket.socket, sink: socket.socket, way: Way, most: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            left = most - getattr(self._tally, way)
            data = await loop.sock_recv(source, min(CHUNK, left + 1))
            if not data:
                with suppress(OSError):  # It may have ended, too.
                    sink.shutdown(socket.SHUT_WR)
                return
            if len(data) > left:
                raise Exhausted(f"{way.upper()}_BYTES", "the connection carried as many bytes as it may")
            await loop.sock_sendall(sink, data)
            setattr(self._tally, way, getattr(self._tally, way) + len(data))
            self._moved = time.monotonic()

    async def _watch(self) -> None:
        end = self._moved + self._limits.total_seconds
        while True:
            now, idle = time.monotonic(), self._moved + self._limits.idle_seconds
            if now >= end:
                raise Exhausted("TOTAL_TIME", "the connection was open as long as it may be")
            if now >= idle:
                raise Exhausted("IDLE", "nothing moved on the connection")
            await asyncio.sleep(min(end, idle) - now)
