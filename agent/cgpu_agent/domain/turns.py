"""Who goes next when many want one slow device: round robin between callers, so that none crowds out the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Hashable
from typing import Any, Generic, TypeVar, overload

from cgpu_agent.errors import Exhausted

T = TypeVar("T")
U = TypeVar("U")


@overload
async def together(first: Awaitable[T], second: Awaitable[U], /) -> tuple[T, U]: ...
@overload
async def together(*work: Awaitable[T]) -> tuple[T, ...]: ...
async def together(*work: Awaitable[Any]) -> tuple[Any, ...]:
    """The results of all, made side by side. Where one fails the others are ended before its error is raised: nobody
    waits for them any more, and they would only keep a device from its next turn."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class RoundRobin(Generic[T]):
    """A queue per owner; ``pop`` serves the owners in turn, each one's entries in order."""

    def __init__(self) -> None:
        self._queues: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def waiting(self, owner: Hashable) -> int:
        """Entries of one owner."""
        return len(self._queues.get(owner, ()))

    def push(self, owner: Hashable, entry: T) -> None:
        self._queues.setdefault(owner, deque()).append(entry)

    def pop(self) -> T:
        """The next entry. Raises ``KeyError`` when there is none."""
        owner, queue = self._queues.popitem(last=False)
        entry = queue.popleft()
        if queue:
            self._queues[owner] = queue  # to the end: the others come first
        return entry


class Turns:
    """Turns at a device.

    Args:
        width: jobs that may be at the device together; 2 keep it busy while one is being handed over.
        waiting_each: jobs that one owner may have waiting.
    """

    def __init__(self, width: int = 2, waiting_each: int = 64) -> None:
        self._width = width
        self._waiting_each = waiting_each
        self._running = 0
        self._queue: RoundRobin[asyncio.Future[None]] = RoundRobin()

    @property
    def waiting(self) -> int:
        """Jobs of all owners that wait."""
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def turn(self, owner: Hashable) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Raises ``Exhausted`` (``TOO_MANY_CALLS``)."""
        if self._running < self._width:
            self._running += 1
        else:
            await self._wait(owner)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, owner: Hashable) -> None:
        if self._queue.waiting(owner) >= self._waiting_each:
            raise Exhausted("TOO_MANY_CALLS", "too many calls of this caller wait for the device", retry_after=0.5)
        mine = asyncio.get_running_loop().create_future()
        self._queue.push(owner, mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._pass_on()  # the turn came in the same instant
            raise

    def _pass_on(self) -> None:
        while self._queue:
            following = self._queue.pop()
            if not following.done():  # whoever stopped waiting is passed over
                following.set_result(None)
                return
        self._running -= 1
