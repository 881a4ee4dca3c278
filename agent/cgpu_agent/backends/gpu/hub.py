"""From the threads that watch devices to whoever follows them on an event loop; nothing is lost in silence."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from cgpu_agent.backends.base import GpuEvent

LIMIT: Final = 256
"""Events that may wait for one follower; a device can raise them faster than anybody reads."""

_OVERFLOW: Final = GpuEvent("watch-lost", None, "events came faster than they were read")


class Follower(AsyncIterator[GpuEvent]):
    """One iterator over events: from its making on, in order. It ends when the hub is closed."""

    def __init__(self) -> None:
        self._loop: Final = asyncio.get_running_loop()
        self._lock: Final = threading.Lock()
        self._events: Final[deque[GpuEvent]] = deque()
        self._rung: Final = asyncio.Event()
        self._ringing = False
        self._ended = False

    async def __anext__(self) -> GpuEvent:
        while True:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self._ended:
                    raise StopAsyncIteration
                self._ringing = False
                self._rung.clear()
            await self._rung.wait()

    def put(self, event: GpuEvent) -> None:
        """From any thread. When too many wait they give way to one ``watch-lost``."""
        with self._lock:
            if len(self._events) >= LIMIT:
                self._events.clear()
                self._events.append(_OVERFLOW)
            self._events.append(event)
            self._ring()

    def end(self) -> None:
        """From any thread: what waits is still handed out."""
        with self._lock:
            self._ended = True
            self._ring()

    def _ring(self) -> None:
        """Wake the loop, once for all that waits: a flood must not fill its queue."""
        if not self._ringing:
            self._ringing = True
            with contextlib.suppress(RuntimeError):  # The loop is closed, and its follower is gone with it.
                self._loop.call_soon_threadsafe(self._rung.set)


class Hub:
    """Hands every event to every follower. A follower that nobody holds any more is forgotten."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._followers: Final[weakref.WeakSet[Follower]] = weakref.WeakSet()
        self._outages: Final[dict[str, GpuEvent]] = {}
        self._closed = False

    def follow(self) -> Follower:
        """On the loop. Whatever is not being watched now is told first, as ``watch-lost``."""
        follower = Follower()
        with self._lock:
            for outage in self._outages.values():
                follower.put(outage)
            if self._closed:
                follower.end()
            self._followers.add(follower)
        return follower

    def publish(self, event: GpuEvent) -> None:
        with self._lock:
            self._publish(event)

    def lose(self, source: str, detail: str) -> None:
        """Say once that ``source`` is no longer watched."""
        with self._lock:
            if source not in self._outages:
                self._outages[source] = GpuEvent("watch-lost", None, detail)
                self._publish(self._outages[source])

    def regain(self, source: str) -> None:
        with self._lock:
            self._outages.pop(source, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for follower in self._followers:
                follower.end()

    def _publish(self, event: GpuEvent) -> None:
        for follower in self._followers:
            follower.put(event)
