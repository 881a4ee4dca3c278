"""The front door's clockwork: epoll, timers and a bell that other threads ring; knows nothing of callers."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
from collections.abc import Callable

_EVENTS_PER_TURN = 256


class Reactor:
    """Calls back when a descriptor is ready or a time has come. One thread turns it; only ``ring`` is for others.

    Args:
        on_bell: called on the turning thread some time after ``ring``.
    """

    def __init__(self, on_bell: Callable[[], None]) -> None:
        self._on_bell = on_bell
        self._watched: dict[int, Callable[[int], None]] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._bell: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._busy_since: float | None = None
        self.watch(self._bell, select.EPOLLIN, self._answer)

    def watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None:
        """Call ``ready(events)`` when ``fd`` is. Raises ``OSError``."""
        self._epoll.register(fd, events)
        self._watched[fd] = ready

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``, which is still open. Does nothing for one that is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` once, after that time."""
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), action))

    def turn(self, *, wait: bool) -> None:
        """Serve what is ready, then what is due; with ``wait``, sleep until there is something.

        A descriptor that is unwatched while a batch is served is not called any more in that batch. Its number must
        not be watched anew before ``turn`` returns, or it would get the old one's event: open sockets between turns.
        """
        self._busy_since = None
        ready = self._epoll.poll(self._patience() if wait else 0, _EVENTS_PER_TURN)
        self._busy_since = time.monotonic()
        for fd, events in ready:
            if (callback := self._watched.get(fd)) is not None:
                callback(events)
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()

    def ring(self) -> bool:
        """Wake the turning thread, from any thread. False once closed."""
        with self._lock:
            if self._bell is None:
                return False
            os.eventfd_write(self._bell, 1)
            return True

    def busy_for(self, now: float) -> float:
        """Seconds (``time.monotonic`` scale) that the present turn has been at work; 0 while it sleeps."""
        since = self._busy_since
        return 0.0 if since is None else max(0.0, now - since)

    def close(self) -> None:
        """Release the descriptors. Idempotent."""
        with self._lock:
            if self._bell is not None:
                os.close(self._bell)
                self._bell = None
        self._epoll.close()

    def _patience(self) -> float:
        return max(0.0, self._later[0][0] - time.monotonic()) if self._later else -1

    def _answer(self, _events: int) -> None:
        if self._bell is not None:
            os.eventfd_read(self._bell)
        self._on_bell()
