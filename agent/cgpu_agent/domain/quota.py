"""How much one caller may have in flight, so that no uid can crowd out the others."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from cgpu_agent.errors import Exhausted


class InFlight:
    """Counts running calls per uid and in all. Not thread-safe: lives on the event loop.

    Args:
        per_uid: calls one uid may have running.
        total: calls all uids together may have running.
    """

    def __init__(self, per_uid: int, total: int) -> None:
        self._limits = (per_uid, total)
        self._by_uid: dict[int, int] = {}
        self.running = 0

    @contextlib.contextmanager
    def hold(self, uid: int) -> Iterator[None]:
        """Hold one slot. Raises ``Exhausted`` (``TOO_MANY_CALLS``)."""
        mine = self._by_uid.get(uid, 0)
        if mine >= self._limits[0] or self.running >= self._limits[1]:
            raise Exhausted("TOO_MANY_CALLS", "too many calls are running; wait for one to end", retry_after=0.1)
        self._by_uid[uid] = mine + 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            if self._by_uid[uid] == 1:
                del self._by_uid[uid]
            else:
                self._by_uid[uid] -= 1


class Budget:
    """How much of something each uid may have, for as long as it likes. Not thread-safe: lives on the event loop.

    Args:
        per_uid: the most.
        slug, message: of the refusal.
    """

    def __init__(self, per_uid: int, slug: str, message: str) -> None:
        self.per_uid = per_uid
        self._told = (slug, message)
        self._taken: Counter[int] = Counter()

    def take(self, uid: int, amount: int) -> None:
        """Raises ``Exhausted``, and then takes nothing."""
        if self._taken[uid] + amount > self.per_uid:
            raise Exhausted(*self._told, retry_after=1.0)
        self._taken[uid] += amount

    def give(self, uid: int, amount: int) -> None:
        """Give back what was taken."""
        self._taken[uid] -= amount
        if not self._taken[uid]:
            del self._taken[uid]
