"""A thread for work on a caller's file, whose file system can be the caller's own and never answer.

Nobody waits for such a thread longer than he likes; what it holds (a slot, a descriptor) is free when it really ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from cgpu_agent.errors import Exhausted, Unavailable

T = TypeVar("T")

_FINISH_SECONDS: Final = 1.0


class Errand:
    """Does one job after another, until ``finish``.

    Args:
        on_end: called on the event loop when the thread has ended.

    Raises ``Exhausted`` (``TOO_MANY_CALLS``): no thread can be had.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        try:
            threading.Thread(target=self._work, name="errand", daemon=True).start()
        except RuntimeError as error:
            raise Exhausted("TOO_MANY_CALLS", "no thread is free for this", retry_after=1.0) from error

    async def run(self, job: Callable[[], T], seconds: float) -> T:
        """The job's result, or what it raises; ``Unavailable`` (``SOURCE_STALLED``) after ``seconds``."""
        result: Future[T] = Future()
        self._jobs.put((job, result))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(result), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise Unavailable("SOURCE_STALLED", "the sealed object's file does not answer in time") from None

    async def finish(self, last: Callable[[], None]) -> None:
        """Do this, too, and end. Nobody waits long for it: it ends when it ends."""
        self._jobs.put((last, Future()))
        self._jobs.put(None)
        await asyncio.wait([self._ended], timeout=_FINISH_SECONDS)

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, result = entry
            if not result.set_running_or_notify_cancel():
                continue
            try:
                result.set_result(job())
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                result.set_exception(error)
            del job, result, entry  # the job may hold a key
        with contextlib.suppress(RuntimeError):  # the loop is closed, and everything with it
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._on_end()
        if not self._ended.done():
            self._ended.set_result(None)
