"""The host sets our clock, so a verdict on certificates gets a floor: no earlier than what has been seen signed."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Final

from cgpu_agent.backends.base import Clock
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import Unavailable

_NAME = "time-floor"
_NO_EARLIER: Final = datetime(2026, 1, 1, tzinfo=timezone.utc)
"""This code did not exist before."""
MAX_STEP: Final = 300.0
"""Seconds by which the host's clock may part from the monotonic one between two looks."""


class TimeFloor:
    """The host's clock with a floor that lives over reboots.

    Args:
        store: where the floor is kept; ``None`` = not beyond this run.
    """

    def __init__(self, clock: Clock, store: Store | None) -> None:
        self._clock = clock
        self._store = store
        self._floor = max(_NO_EARLIER.timestamp(), self._kept())
        self._seen = (clock.monotonic(), clock.time())

    def _kept(self) -> float:
        data = b"" if self._store is None else self._store.read(_NAME) or b""
        return float(data) if data.isdigit() and len(data) <= 11 else 0.0

    def now(self) -> datetime:
        """The host's time. Raises ``Unavailable`` (``CLOCK_BEFORE_FLOOR``): it is known to be wrong."""
        now = self._clock.time()
        if now < self._floor:
            raise Unavailable("CLOCK_BEFORE_FLOOR", "the clock is behind what was signed before: set it right")
        return datetime.fromtimestamp(now, timezone.utc)

    def rise(self, signed: datetime) -> None:
        """Somebody who is trusted signed at this moment, so it has passed."""
        moment = signed.timestamp()
        if moment <= self._floor:
            return
        self._floor = moment
        if self._store is not None:
            self._store.write(_NAME, str(int(moment)).encode())

    def stepped(self) -> bool:
        """Whether somebody moved the clock since the last look."""
        now = (self._clock.monotonic(), self._clock.time())
        elapsed, told = now[0] - self._seen[0], now[1] - self._seen[1]
        self._seen = now
        return abs(told - elapsed) > MAX_STEP
