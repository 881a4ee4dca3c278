"""The owner of the TPM: one thread, one context, one job at a time, each with a deadline.

An ESYS context is not thread-safe and a TPM is serial, so more threads would gain nothing. The caller's deadline is
kept by its event loop, not by this thread: the kernel may hold the thread inside a call to a hung device.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.transport import Transport, timed_out
from cgpu_agent.errors import DeviceFault, Unavailable

T = TypeVar("T")

_IDLE_BEAT: Final = 1.0
_CLOSE_GRACE: Final = 2.0


class _Job:
    """One call of ``run``: what to do, until when, and the future that waits for it."""

    __slots__ = ("_abandoned", "_future", "_lock", "_loop", "_started", "deadline", "idempotent", "work")

    def __init__(self, work: Callable[[TpmCommands], Any], deadline: float, *, idempotent: bool) -> None:
        self.work: Final = work
        self.deadline: Final = deadline
        self.idempotent: Final = idempotent
        self._loop: Final = asyncio.get_running_loop()
        self._future: Final[asyncio.Future[Any]] = self._loop.create_future()
        self._lock: Final = threading.Lock()
        self._started = False
        self._abandoned = False

    async def wait(self, timeout: float) -> Any:
        """On the loop: the result, or ``TPM_TIMEOUT`` after ``timeout`` seconds."""
        timer = self._loop.call_later(timeout, self._expire)
        try:
            return await self._future
        finally:
            timer.cancel()
            self._abandon()

    def start(self) -> bool:
        """On the owner's thread: false when nobody waits any more, and then the job must not run."""
        with self._lock:
            self._started = not self._abandoned
            return self._started

    def settle(self, result: Any, error: BaseException | None) -> None:
        """On the owner's thread: hand the outcome to the loop."""
        try:
            self._loop.call_soon_threadsafe(self._resolve, result, error)
        except RuntimeError:
            return  # The loop is closed, and its callers are gone with it.

    def _resolve(self, result: Any, error: BaseException | None) -> None:
        if self._future.done():
            return
        if error is None:
            self._future.set_result(result)
        else:
            self._future.set_exception(error)

    def _expire(self) -> None:
        started = self._abandon()
        self._resolve(None, _failed(timed_out(), self, started=started))

    def _abandon(self) -> bool:
        with self._lock:
            self._abandoned = True
            return self._started


class TpmOwner:
    """``Tpm`` over any transport; see ``backends.base``.

    Args:
        open_transport: opens the TPM (``transport.open_tpm``); called again after each failure. Its ``DeviceFault``
            fails the job that needed it, and the next job tries again.
        command_timeout: seconds for one TPM command, at most; a job's own deadline may be shorter.
        queue_limit: jobs that may wait.
    """

    def __init__(
        self,
        open_transport: Callable[[], Transport],
        *,
        command_timeout: float = 30.0,
        queue_limit: int = 256,
    ) -> None:
        self._open_transport: Final = open_transport
        self._command_timeout: Final = command_timeout
        self._jobs: Final[queue.Queue[_Job | None]] = queue.Queue(queue_limit)
        self._closing: Final = threading.Lock()
        self._closed = False
        self._commands: Commands | None = None
        self._running_until: float | None = None
        self._beat = time.monotonic()
        self._thread: Final = threading.Thread(target=self._serve, name="tpm-owner", daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[TpmCommands], T], *, timeout: float, idempotent: bool = True) -> T:
        entry = _Job(job, time.monotonic() + timeout, idempotent=idempotent)
        with self._closing:
            if self._closed:
                raise _closed()
            try:
                self._jobs.put_nowait(entry)
            except queue.Full:
                raise Unavailable("TPM_QUEUE_FULL", "too many jobs wait for the TPM", retry_after=1.0) from None
        result: T = await entry.wait(timeout)
        return result

    def heartbeat_age(self, now: float) -> float:
        until = self._running_until
        if until is not None and self._thread.is_alive():
            return max(0.0, now - until)
        return max(0.0, now - self._beat)

    def close(self) -> None:
        with self._closing:
            self._closed = True
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.settle(None, _closed())
        self._jobs.put_nowait(None)
        self._thread.join(_CLOSE_GRACE)

    def _serve(self) -> None:
        while not self._closed:
            self._beat = time.monotonic()
            try:
                job = self._jobs.get(timeout=_IDLE_BEAT)
            except queue.Empty:
                continue
            if job is not None and job.start():
                self._running_until = job.deadline
                self._perform(job)
                self._running_until = None
        self._discard()

    def _perform(self, job: _Job) -> None:
        result, error, transport_failed = self._attempt(job)
        if transport_failed and job.idempotent and not self._closed:
            result, error, _ = self._attempt(job)
        job.settle(result, error)

    def _attempt(self, job: _Job) -> tuple[Any, BaseException | None, bool]:
        """Run the job once: its result, its error, and whether the transport failed under it."""
        if time.monotonic() >= job.deadline:
            return None, timed_out(), False
        try:
            commands = self._opened(job.deadline)
        except BaseException as error:  # noqa: BLE001 - the owner outlives whatever goes wrong in a job
            return None, error, False
        try:
            return job.work(commands), None, False
        except BaseException as error:  # noqa: BLE001 - as above
            if commands.broken and isinstance(error, DeviceFault):
                return None, _failed(error, job), True
            return None, error, False
        finally:
            if commands.stale:
                self._discard()

    def _opened(self, deadline: float) -> Commands:
        if self._commands is None:
            self._commands = Commands(
                self._open_transport(), command_timeout=self._command_timeout, deadline=deadline
            )
        self._commands.set_deadline(deadline)
        return self._commands

    def _discard(self) -> None:
        commands, self._commands = self._commands, None
        if commands is not None:
            with contextlib.suppress(OSError):
                commands.close()


def _failed(fault: DeviceFault, job: _Job, *, started: bool = True) -> DeviceFault:
    """The error of a job that stopped in its middle."""
    if job.idempotent or not started:
        return fault
    # Without a time to retry: a client that repeats it by itself may do it twice.
    unknown = DeviceFault(fault.slug, fault.message, outcome_unknown=True)
    unknown.__cause__ = fault
    return unknown


def _closed() -> DeviceFault:
    return DeviceFault("TPM_CLOSED", "the TPM is no longer in use")
