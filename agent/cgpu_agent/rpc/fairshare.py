"""How much callers may send: all they like, unless calls wait for their turn and several uids send: then a share.

Calls are small and the server behind the door works them off in the order in which they come. So whoever sends most
would make everybody else wait; but what is not read yet waits with its sender.
"""

from __future__ import annotations

from typing import Final

from cgpu_agent.rpc.admission import Seat

RATE: Final = 16 << 10
"""Bytes a second of a uid, while others send: about 500 calls, which have 33 bytes and more."""
BURST: Final = 16 << 10
CONNECTION: Final = 512
"""Bytes that a new connection counts for: asking who it is costs as much as a few calls."""
_ALONE_SECONDS: Final = 1.0
_MANY: Final = 256


class FairShare:
    """Counts by seat. Not thread-safe: it belongs to the door's thread. Times are ``time.monotonic``'s."""

    def __init__(self, rate: float = RATE, burst: float = BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._left: dict[Seat, tuple[float, float]] = {}
        self._newest: tuple[Seat, float] | None = None
        self._before = -_ALONE_SECONDS
        """When anybody but the newest last sent something."""

    def allowed(self, seat: Seat, now: float) -> int | None:
        """Bytes that may be taken now; ``None`` = any number."""
        if seat == "own" or self._newest is None:
            return None
        newest, when = self._newest
        other = self._before if newest == seat else when
        return None if now - other > _ALONE_SECONDS else int(self._balance(seat, now))

    def took(self, seat: Seat, count: int, now: float) -> None:
        """So much was taken."""
        if seat == "own" or not count:
            return
        if self._newest is not None and self._newest[0] != seat:
            self._before = self._newest[1]
        self._newest = (seat, now)
        self._left[seat] = (max(0.0, self._balance(seat, now) - count), now)
        if len(self._left) > _MANY:
            self._left = {each: kept for each, kept in self._left.items() if self._balance(each, now) < self._burst}

    def _balance(self, seat: Seat, now: float) -> float:
        left, since = self._left.get(seat, (self._burst, now))
        return min(self._burst, left + (now - since) * self._rate)
