"""How many connections the front door holds, and for whom: counted before anything costly is done for a caller."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Seat = int | Literal["own", "unidentified"]
"""What a connection counts against: a uid, this process itself, or everybody whom the kernel cannot name."""


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """Bounds of the front door.

    Attributes:
        max_connections: of identified callers, in all.
        max_per_uid: of one uid.
        max_unidentified: of callers without an identity; they only ever get a refusal.
        bytes_per_wake: moved for one direction of one connection before the others have their turn.
        accepts_per_wake: connections taken from one listener before the others have their turn.
        accept_backoff: seconds without accepting after running out of descriptors or memory.
        connect_retry, connect_tries: seconds between attempts, and attempts, while the inner server's queue is full.
    """

    max_connections: int = 1024
    max_per_uid: int = 64
    max_unidentified: int = 8
    bytes_per_wake: int = 1024 * 1024
    accepts_per_wake: int = 32
    accept_backoff: float = 0.1
    connect_retry: float = 0.02
    connect_tries: int = 50


@dataclass(frozen=True, slots=True)
class DoorStats:
    """The front door at one moment: ``open`` and ``held_bytes`` are levels, the rest counts since the start.

    Attributes:
        open: connections now.
        held_bytes: read from one side and not yet taken by the other, over all connections.
        accepted: connections that got a seat.
        refused_by_limit: accepted and closed at once.
        cut_dead: ended because the connecting process died, or it was dead on arrival.
        unidentified: callers whom the kernel could not name.
        out_of_resources: times that accepting paused for lack of descriptors or memory.
        inner_unavailable: callers dropped because the inner server did not take them.
    """

    open: int
    held_bytes: int
    accepted: int
    refused_by_limit: int
    cut_dead: int
    unidentified: int
    out_of_resources: int
    inner_unavailable: int


class Admission:
    """Counts seats. Not thread-safe: it belongs to the door's thread.

    This process itself always gets in, by pid: its self check must not fail because callers filled the door.
    """

    def __init__(self, limits: DoorLimits) -> None:
        self._limits = limits
        self._taken: Counter[Seat] = Counter()
        self._callers = 0

    def enter(self, seat: Seat) -> bool:
        """Take a seat, if one is free."""
        if isinstance(seat, int):
            if self._callers >= self._limits.max_connections or self._taken[seat] >= self._limits.max_per_uid:
                return False
            self._callers += 1
        elif seat == "unidentified" and self._taken[seat] >= self._limits.max_unidentified:
            return False
        self._taken[seat] += 1
        return True

    def leave(self, seat: Seat) -> None:
        """Give a seat back that ``enter`` granted."""
        self._taken[seat] -= 1
        if not self._taken[seat]:
            del self._taken[seat]
        if isinstance(seat, int):
            self._callers -= 1
