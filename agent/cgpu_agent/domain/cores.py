"""Who copies how much at a time: a uid with many channels gets no more of the cores than one with few."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

_ACTIVE_SECONDS: Final = 0.1
"""A uid counts as busy for so long after a piece of work, so that its next one finds its share."""
_LOOK_SECONDS: Final = 0.05
PATIENCE: Final = 0.5
"""Seconds that a piece waits for its turn, and no longer: the one before it may be stuck in a GPU."""


class Cores:
    """Shares out cores among uids, by how many pieces of work of a uid are done at a time. Any thread may call.

    A uid that is alone is left to the kernel.

    Args:
        cores: how many there are, by default as many as this process may use.
        now: the clock.
    """

    def __init__(self, cores: int | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._cores: Final = cores or len(os.sched_getaffinity(0))
        self._now: Final = now
        self._changed: Final = threading.Condition()
        self._running: Final[Counter[int]] = Counter()
        self._busy_until: Final[dict[int, float]] = {}

    @contextlib.contextmanager
    def turn(self, uid: int, require: Callable[[], None]) -> Iterator[None]:
        """Hold a core for a piece of work, when it is this uid's turn.

        Args:
            require: raises when the work is not to be done any more; asked while it waits.
        """
        with self._changed:
            self._touch(uid)
            until = self._now() + PATIENCE
            while self._running[uid] >= self._share() and len(self._busy_until) > 1 and self._now() < until:
                self._changed.wait(_LOOK_SECONDS)
                require()
                self._touch(uid)
            self._running[uid] += 1
        try:
            yield
        finally:
            with self._changed:
                self._running[uid] -= 1
                self._touch(uid)
                self._changed.notify_all()

    def _share(self) -> int:
        return max(1, self._cores // len(self._busy_until))

    def _touch(self, uid: int) -> None:
        now = self._now()
        self._busy_until[uid] = now + _ACTIVE_SECONDS
        for other, until in list(self._busy_until.items()):
            if until < now and not self._running[other]:
                del self._busy_until[other], self._running[other]
