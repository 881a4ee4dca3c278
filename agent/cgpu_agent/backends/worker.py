"""The thread that owns a device: one queue, one job at a time, each with a deadline that the caller's loop keeps.

The deadline is kept by the event loop, not by the thread: the kernel may hold the thread in a call to a hung device.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.errors import DeviceFault, Unavailable

_CLOSE_GRACE: Final = 2.0


@dataclass(frozen=True, slots=True)
class Faults:
    """A device's own words for what any worker may say; each builds a new error."""

    timed_out: Callable[[], DeviceFault]
    closed: Callable[[], DeviceFault]
    queue_full: Callable[[], Unavailable]


class Job:
    """One call of ``Worker.run``: what to do, until when, and the future that waits for it."""

    __slots__ = ("_abandoned", "_faults", "_future", "_lock", "_loop", "_started", "deadline", "idempotent", "work")

    def __init__(self, work: Callable[[Any], Any], deadline: float, faults: Faults, *, idempotent: bool) -> None:
        self.work: Final = work
        self.deadline: Final = deadline
        self.idempotent: Final = idempotent
        self._faults: Final = faults
        self._loop: Final = asyncio.get_running_loop()
        self._future: Final[asyncio.Future[Any]] = self._loop.create_future()
        self._lock: Final = threading.Lock()
        self._started = False
        self._abandoned = False

    async def wait(self, timeout: float) -> Any:
        """On the loop: the result, or the time-out fault after ``timeout`` seconds."""
        timer = self._loop.call_later(timeout, self._expire)
        try:
            return await self._future
        finally:
            timer.cancel()
            self._abandon()

    def start(self) -> bool:
        """On the worker's thread: false when nobody waits any more, and then the job must not run."""
        with self._lock:
            self._started = not self._abandoned
            return self._started

    def settle(self, result: Any, error: BaseException | None) -> None:
        """On the worker's thread: hand the outcome to the loop."""
        try:
            self._loop.call_soon_threadsafe(self._resolve, result, error)
        except RuntimeError:
            return  # The loop is closed, and its callers are gone with it.

    def failed(self, fault: DeviceFault, *, started: bool = True) -> DeviceFault:
        """The error of a job that stopped in its middle."""
        if self.idempotent or not started:
            return fault
        # Without a time to retry: a client that repeats it by itself may do it twice.
        unknown = DeviceFault(fault.slug, fault.message, outcome_unknown=True)
        unknown.__cause__ = fault
        return unknown

    def _resolve(self, result: Any, error: BaseException | None) -> None:
        if self._future.done():
            return
        if error is None:
            self._future.set_result(result)
        else:
            self._future.set_exception(error)

    def _expire(self) -> None:
        started = self._abandon()
        self._resolve(None, self.failed(self._faults.timed_out(), started=started))

    def _abandon(self) -> bool:
        with self._lock:
            self._abandoned = True
            return self._started


class Worker:
    """The thread and its queue; starts at once.

    Args:
        name: of the thread.
        perform: runs a job that somebody waits for, on the thread, and settles it; must not raise.
        retire: called on the thread after the last job.
        faults: what a caller gets when there is no answer.
        idle_beat: seconds between two signs of life while there is nothing to do.
        queue_limit: jobs that may wait.
    """

    def __init__(
        self,
        name: str,
        perform: Callable[[Job], None],
        retire: Callable[[], None],
        faults: Faults,
        *,
        idle_beat: float = 1.0,
        queue_limit: int = 256,
    ) -> None:
        self._idle_beat: Final = idle_beat
        self._perform: Final = perform
        self._retire: Final = retire
        self._faults: Final = faults
        self._jobs: Final[queue.Queue[Job | None]] = queue.Queue(queue_limit)
        self._closing: Final = threading.Lock()
        self._closed = False
        self._running_until: float | None = None
        self._beat = time.monotonic()
        self._thread: Final = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return self._jobs.qsize()

    async def run(self, work: Callable[[Any], Any], *, timeout: float, idempotent: bool = True) -> Any:
        """Queue ``work`` and wait ``timeout`` seconds at most, for its turn and for its result together."""
        job = Job(work, time.monotonic() + timeout, self._faults, idempotent=idempotent)
        with self._closing:
            if self._closed:
                raise self._faults.closed()
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                raise self._faults.queue_full() from None
        return await job.wait(timeout)

    def heartbeat_age(self, now: float) -> float:
        """See ``Tpm.heartbeat_age``: an idle worker counts as alive, a job past its deadline does not."""
        until = self._running_until
        if until is not None and self._thread.is_alive():
            return max(0.0, now - until)
        return max(0.0, now - self._beat)

    def close(self) -> None:
        """Stop; jobs in the queue fail as closed. Idempotent."""
        with self._closing:
            self._closed = True
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.settle(None, self._faults.closed())
        self._jobs.put_nowait(None)
        self._thread.join(_CLOSE_GRACE)

    def _serve(self) -> None:
        while not self._closed:
            self._beat = time.monotonic()
            try:
                job = self._jobs.get(timeout=self._idle_beat)
            except queue.Empty:
                continue
            if job is not None and job.start():
                self._running_until = job.deadline
                self._perform(job)
                self._running_until = None
        self._retire()
