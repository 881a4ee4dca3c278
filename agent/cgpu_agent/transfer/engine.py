"""All channels of an agent, each with a thread of its own, so that one that stalls holds up none of the others.

Cipher and large copies release the GIL, so as many channels run at a time as there are cores; the kernel shares them
out. In a pool of as many threads as cores, two stalled channels could stop all others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, Protocol, TypeVar

from cgpu_agent.errors import Exhausted, Unavailable


class Closable(Protocol):
    """A channel, as far as the engine goes: ``Channel``, or what a GPU has in its place."""

    def close(self) -> None:
        """End it; waits for whoever is using it. Idempotent."""


C = TypeVar("C", bound=Closable)
T = TypeVar("T")

CHANNELS_PER_CORE: Final = 8
MAX_WAITING: Final = 64
"""Transfers of one channel that may wait for their turn."""


class _Lane(Generic[C]):
    """A channel, its thread and how many transfers are waiting there."""

    def __init__(self, channel: C) -> None:
        self.channel: Final = channel
        self.worker: Final = ThreadPoolExecutor(1, thread_name_prefix="transfer")
        self.waiting = 0


class Engine(Generic[C]):
    """Runs transfers of many channels.

    Args:
        limit: channels at a time; by default ``CHANNELS_PER_CORE`` for each core this process may use.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit: Final = limit or CHANNELS_PER_CORE * len(os.sched_getaffinity(0))
        self._lanes: Final[dict[C, _Lane[C]]] = {}
        self._lock: Final = threading.Lock()

    def add(self, channel: C) -> None:
        """Take over a channel. Raises ``Exhausted`` (``TRANSFER_CHANNELS``), and closes it."""
        with self._lock:
            full = len(self._lanes) >= self._limit
            if not full:
                self._lanes[channel] = _Lane(channel)
        if full:
            channel.close()
            raise Exhausted("TRANSFER_CHANNELS", f"there are {self._limit} transfer channels already")

    def submit(self, channel: C, work: Callable[[C], T]) -> Future[T]:
        """Have ``work`` done in the channel's thread, after what was submitted before.

        Raises:
            Exhausted: ``TRANSFER_QUEUE``.
            Unavailable: ``TRANSFER_STOPPED``: not a channel of this engine (any more).
        """
        with self._lock:
            lane = self._lanes.get(channel)
            if lane is None:
                raise Unavailable("TRANSFER_STOPPED", "this transfer channel was closed")
            if lane.waiting >= MAX_WAITING:
                raise Exhausted("TRANSFER_QUEUE", f"{MAX_WAITING} transfers are waiting in this channel")
            lane.waiting += 1
            future = lane.worker.submit(work, channel)
        future.add_done_callback(lambda _: self._done(lane))
        return future

    def remove(self, channel: C) -> None:
        """Close a channel; transfers that wait are cancelled. Idempotent. Not from within the channel's own work."""
        with self._lock:
            lane = self._lanes.pop(channel, None)
        if lane is not None:
            lane.worker.shutdown(wait=False, cancel_futures=True)
        channel.close()
        if lane is not None:
            lane.worker.shutdown()

    def close(self) -> None:
        """Close all channels."""
        with self._lock:
            channels = list(self._lanes)
        for channel in channels:
            self.remove(channel)

    def _done(self, lane: _Lane[C]) -> None:
        with self._lock:
            lane.waiting -= 1
