"""Whether the server behind the door keeps up, and how much may go in before it has come to what went in already.

Calls wait in the server in the order in which they came, where nobody can tell how many there are. So the door makes
one of its own: when that is answered, so is, or soon will be, everything before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Final

import grpc

AHEAD: Final = 2 << 10
"""Bytes that go in, of a uid that sends alone, before the server is asked: about 50 calls."""
_MARK: Final = "/cgpu.agent.internal.Mark/Here"  # which there is not: to say so is all that the server does
_MARK_SECONDS: Final = 5.0
_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
_LATE_SECONDS: Final = 0.01
_PROBE_SECONDS: Final = 0.05
_PRESSED_SECONDS: Final = 60.0


class Pressure:
    """One server's, as seen by another thread, which is this object's.

    It is asked while there are calls, and not otherwise. Once it was late it counts as pressed for a while: it is on
    time again *because* shares are enforced.

    Args:
        loop: the server's.
        inner: path of its socket.
        heard: called on the loop's thread when there is room again.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, inner: str, heard: Callable[[], object]) -> None:
        self._loop = loop
        self._inner = inner
        self._heard = heard
        self._call: Any = None
        self._task: asyncio.Task[None] | None = None
        self._asked = -_PROBE_SECONDS
        self._answered = True
        self._until = 0.0
        self.room = AHEAD
        """Bytes that may go in before ``heard``; 0 or less: none."""

    def pressed(self, now: float) -> bool:
        """Ask again if it is time; whether the server is late, or was lately."""
        if now - self._asked >= _PROBE_SECONDS:
            self._ask(now)
        return now < self._until or (not self._answered and now - self._asked > _LATE_SECONDS)

    def took(self, count: int, now: float) -> None:
        """So much went in of the room there was."""
        self.room -= count
        if self.room <= 0:
            self._ask(now)

    def _ask(self, now: float) -> None:
        if self._answered:
            self._asked, self._answered = now, False
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._mark, now, self.room <= 0)

    def _mark(self, asked: float, full: bool) -> None:
        self._task = self._loop.create_task(self._wait(asked, full))

    async def _wait(self, asked: float, full: bool) -> None:
        if self._call is None:
            channel = grpc.aio.insecure_channel(f"unix:{self._inner}", options=_OPTIONS)
            self._call = channel.unary_unary(_MARK)
        with contextlib.suppress(Exception):  # whatever came of it: who waits to be heard must not wait for ever
            await self._call(b"", timeout=_MARK_SECONDS)
        now = time.monotonic()
        if now - asked > _LATE_SECONDS:
            self._until = now + _PRESSED_SECONDS
        self._answered = True
        if full:
            self.room = AHEAD
            self._heard()
        elif self.room <= 0:  # what has filled it went in after this question
            self._ask(now)
