"""Feeds systemd's watchdog only while every part whose hang would matter proves that it is alive."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cgpu_agent.backends.notify import Notifier

Heartbeat = tuple[Callable[[float], float], float]
"""(age of the last sign of life at a ``time.monotonic`` instant, largest healthy age), both in seconds."""


class Watchdog:
    """Called from the event loop, whose own life is thereby part of the proof.

    Args:
        notifier: takes the pings.
        heartbeats: the other parts, by the name an operator reads.
    """

    def __init__(self, notifier: Notifier, heartbeats: Mapping[str, Heartbeat]) -> None:
        self._notifier = notifier
        self._heartbeats = dict(heartbeats)
        self._fed = 0.0

    def stuck(self, now: float) -> tuple[str, ...]:
        """Parts that gave no sign of life for too long."""
        return tuple(name for name, (age, limit) in self._heartbeats.items() if age(now) > limit)

    def feed(self, now: float) -> None:
        """Ping if due and if nothing is stuck; without pings systemd restarts the agent."""
        period = self._notifier.watchdog_seconds
        if period is None or now - self._fed < period / 3 or self.stuck(now):
            return
        self._fed = now
        self._notifier.ping()
