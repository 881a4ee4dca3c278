"""What ``cgpuctl transfer bench`` measures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cgpu_agent.cli.progress import Progress
from cgpu_agent.client.channels import Channel

SMALL = 4096


@dataclass(frozen=True, slots=True)
class Measured:
    """Copies one way, one after the other: large ones, then small ones.

    Attributes:
        size, copies, seconds: of the large ones: bytes of each, how many, in which time.
        waited: seconds that each small one took, from the call to the device's word.
    """

    size: int
    copies: int
    seconds: float
    waited: tuple[float, ...]

    @property
    def gigabytes(self) -> float:
        """1e9 bytes a second."""
        return self.copies * self.size / self.seconds / 1e9

    def small(self, share: float) -> float:
        """Seconds within which this share of the small ones was made (nearest rank)."""
        return sorted(self.waited)[math.ceil(share * len(self.waited)) - 1]


def measure(channel: Channel, ways: Sequence[str], size: int, seconds: float) -> dict[str, Measured]:
    """Copies between the device and memory on lease, so that nothing but the agent's work is in the way.

    Args:
        ways: ``to`` and ``from`` the device.
        seconds: for copies of ``size`` bytes, and again for small ones; one of each is made in any case.
    """
    room = max(size, SMALL)
    memory, handle = channel.buffer(room).view, channel.allocate(room)

    def copy(way: str, count: int) -> Callable[[], object]:
        part = memory[:count]
        return lambda: channel.put(part, handle=handle) if way == "to" else channel.get(handle, part)

    found = {}
    for way in ways:
        progress = Progress(f"{way} device", None)
        copy(way, size)()  # what is done once is done now
        try:
            large = _timed(copy(way, size), seconds, lambda bar=progress: bar.add(size))  # type: ignore[misc]
        finally:
            progress.end()
        small = _timed(copy(way, SMALL), seconds, lambda: None)
        found[way] = Measured(size, len(large), sum(large), tuple(small))
    return found


def _timed(work: Callable[[], object], seconds: float, after: Callable[[], None]) -> list[float]:
    """Seconds that each call took, for so long."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while not took or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
        after()
    return took
