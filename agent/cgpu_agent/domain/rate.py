"""How often one caller may ask, however many connections it has: a bucket of tokens for each uid."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from cgpu_agent.backends.base import Clock
from cgpu_agent.errors import Exhausted

MAX_UIDS: Final = 4096


class Rate:
    """Not thread-safe: lives on the event loop.

    Args:
        per_minute: what one uid may ask in a minute, all of it at once if it likes.
        slug, message: of the refusal.
    """

    def __init__(self, clock: Clock, per_minute: int, slug: str, message: str) -> None:
        self.clock = clock
        self._size = float(per_minute)
        self._slug = slug
        self._message = message
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def take(self, uid: int) -> None:
        """Take a token. Raises ``Exhausted``, with the time until there is another."""
        self.require(uid, 1.0)
        self.spend(uid, 1.0)

    def require(self, uid: int, least: float) -> None:
        """Raises ``Exhausted``, with the time until there are ``least`` tokens, if there are fewer."""
        left = self._left(uid)
        if left < least:
            raise Exhausted(self._slug, self._message, retry_after=(least - left) * 60.0 / self._size)

    def spend(self, uid: int, amount: float) -> None:
        """Take tokens, where the price is known afterwards only: more than there are, if need be."""
        self._keep(uid, self._left(uid) - amount, self.clock.monotonic())

    def _left(self, uid: int) -> float:
        now = self.clock.monotonic()
        left, since = self._buckets.pop(uid, (self._size, now))
        left = min(self._size, left + (now - since) * self._size / 60.0)
        self._keep(uid, left, now)
        return left

    def _keep(self, uid: int, left: float, now: float) -> None:
        # Who has not asked for longest is forgotten first: by then its bucket is fullest.
        self._buckets.pop(uid, None)
        if len(self._buckets) >= MAX_UIDS:
            self._buckets.popitem(last=False)
        self._buckets[uid] = (left, now)
