"""The owner of the TPM: one thread, one context, one job at a time, each with a deadline.

An ESYS context is not thread-safe and a TPM is serial, so more threads would gain nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.transport import Metered, Transport, timed_out
from cgpu_agent.backends.worker import Faults, Job, Worker
from cgpu_agent.errors import DeviceFault, Unavailable
from cgpu_agent.wire.metrics import Histogram

T = TypeVar("T")

_IDLE_BEAT: Final = 1.0
_COMMAND_SECONDS: Final = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)


class TpmOwner:
    """``Tpm`` over any transport; see ``backends.base``.

    Args:
        open_transport: opens the TPM (``transport.open_tpm``); called again after each failure. Its ``DeviceFault``
            fails the job that needed it, and the next job tries again.
        command_timeout: seconds for one TPM command, at most; a job's own deadline may be shorter.
        queue_limit: jobs that may wait.

    Attributes:
        seconds: of each command that was sent, answered or not.
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
        self._commands: Commands | None = None
        self.seconds: Final = Histogram(_COMMAND_SECONDS)
        self._worker: Final = Worker(
            "tpm-owner", self._perform, self._discard, _FAULTS, idle_beat=_IDLE_BEAT, queue_limit=queue_limit
        )

    async def run(self, job: Callable[[TpmCommands], T], *, timeout: float, idempotent: bool = True) -> T:
        result: T = await self._worker.run(job, timeout=timeout, idempotent=idempotent)
        return result

    def heartbeat_age(self, now: float) -> float:
        return self._worker.heartbeat_age(now)

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return self._worker.waiting

    def close(self) -> None:
        self._worker.close()

    def _perform(self, job: Job) -> None:
        result, error, transport_failed = self._attempt(job)
        if transport_failed and job.idempotent and not self._worker.closed:
            result, error, _ = self._attempt(job)
        job.settle(result, error)

    def _attempt(self, job: Job) -> tuple[Any, BaseException | None, bool]:
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
                return None, job.failed(error), True
            return None, error, False
        finally:
            if commands.stale:
                self._discard()

    def _opened(self, deadline: float) -> Commands:
        if self._commands is None:
            transport = Metered(self._open_transport(), self.seconds)
            self._commands = Commands(transport, command_timeout=self._command_timeout, deadline=deadline)
        self._commands.set_deadline(deadline)
        return self._commands

    def _discard(self) -> None:
        commands, self._commands = self._commands, None
        if commands is not None:
            with contextlib.suppress(OSError):
                commands.close()


def _closed() -> DeviceFault:
    return DeviceFault("TPM_CLOSED", "the TPM is no longer in use")


def _queue_full() -> Unavailable:
    return Unavailable("TPM_QUEUE_FULL", "too many jobs wait for the TPM", retry_after=1.0)


_FAULTS: Final = Faults(timed_out, _closed, _queue_full)
