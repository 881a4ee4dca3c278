"""Opens sealed objects for callers: the key stays here, verified plaintext goes into memory on lease to them.

Every segment is opened in private memory and copied out when its tag fits. The memory holds the whole object when
the last step says so and the stream has ended well; whatever ends it otherwise wipes the memory first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Final

from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.errand import Errand
from cgpu_agent.domain.leases import Lease, Leases, Process
from cgpu_agent.domain.quota import InFlight
from cgpu_agent.domain.release import Begin, Release
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse
from cgpu_agent.objects.file import SealedFile
from cgpu_agent.wire.sealed import SEGMENT_SIZES, ObjectName

OPENS: Final = 8
OPENS_PER_UID: Final = 2
STEP: Final = 16 << 20
"""Bytes between two looks at policy and trust."""
_PIECE: Final = 1 << 20
STEP_SECONDS: Final = 60.0
OPEN_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Step:
    """How far an object is opened: bytes of plaintext; ``whole``: this is all of it."""

    done: int
    total: int
    whole: bool = False


class _Copy:
    """The thread's side: one object, from its file into the memory."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._fd: int | None = None
        self._file: SealedFile | None = None
        self._turn = 0
        self._piece = memoryview(bytearray(_PIECE))
        self.stopped = threading.Event()

    def open(self, secret: bytes, name: ObjectName, segment_size: int) -> int:
        """Begin: verify the object's end, and make room. Returns its size in bytes."""
        self._fd = self._lease.source()
        self._file = SealedFile(self._fd, secret, name, segment_size)
        if self._file.size > self._lease.memory.size:
            raise Misuse("OBJECT_TOO_LARGE_FOR_LEASE", "the object is larger than the memory on lease")
        self._turn = self._lease.memory.begin()
        return self._file.size

    def copy(self, start: int, end: int) -> None:
        """Open and copy the plaintext from ``start`` to ``end``."""
        while start < end and self._file is not None and not self.stopped.is_set():
            piece = self._piece[: min(_PIECE, end - start)]
            self._file.read_into(start, piece)
            self._lease.memory.write(self._turn, start, piece)
            start += len(piece)

    def settle(self) -> None:
        """The object is whole: an end of the agent takes it no more."""
        self._lease.memory.settle(self._turn)

    def close(self) -> None:
        """Forget the plaintext that is still here. May wait for a file system of the caller's."""
        self._file = None
        self._piece[:] = bytes(_PIECE)
        if self._fd is not None:
            os.close(self._fd)


class Opening:
    """Opens for everybody.

    Args:
        release: gives out the keys, by policy and on record.
        leases: where the plaintext goes.
    """

    def __init__(self, release: Release, leases: Leases) -> None:
        self._release = release
        self._leases = leases
        self._slots = InFlight(OPENS_PER_UID, OPENS)

    async def open(
        self, caller: Caller, process: Process, lease: bytes, name: ObjectName, segment_size: int, begin: Begin
    ) -> AsyncGenerator[Step, None]:
        """Open the object that came with the lease; close the iterator to stop.

        Args:
            process: the caller's; the lease must be its own.
            name: what the object must be.
            segment_size: how it is cut.
            begin: as ``Release.get``'s.

        Raises:
            Misuse: ``BAD_SEGMENT_SIZE``, ``NO_SOURCE``, ``SOURCE_UNREADABLE``, ``OBJECT_TOO_LARGE_FOR_LEASE``; all
                reasons of ``SealedFile``: the object is not the one named.
            Denied: ``NO_LEASE``.
            Exhausted: ``TOO_MANY_CALLS``, ``LEASE_BUSY``.
            Unavailable: ``TRUST_CHANGED``, ``LEASE_GONE``, ``SOURCE_LOST``, ``SOURCE_STALLED``.
            DeviceFault: ``CALL_TIMEOUT``.
            All that ``Release.open`` raises.
        """
        require_segment_size(segment_size)
        # Slot and lease are given back when the thread has ended, and nothing can touch either any more.
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(self._slots.hold(caller.uid))
            held = stack.enter_context(self._leases.borrowed(lease, process))
            errand = Errand(stack.close)
        except BaseException:
            stack.close()
            raise
        copy = _Copy(held)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        until = loop.time() + OPEN_SECONDS
        # Who takes no messages holds this task where nothing else ends it.
        stalled = None if task is None else loop.call_at(until + 2 * STEP_SECONDS, task.cancel)
        try:
            secret, still = await self._release.open(caller, name, begin)
            opened = partial(copy.open, secret, name, segment_size)
            del secret
            total = await errand.run(opened, STEP_SECONDS)
            del opened
            for start in range(0, total, STEP):
                end = min(start + STEP, total)
                await errand.run(partial(copy.copy, start, end), STEP_SECONDS)
                still()
                if loop.time() > until:
                    raise DeviceFault("CALL_TIMEOUT", "the call took too long", retry_after=1.0)
                yield Step(end, total)
            still()
            yield Step(total, total, whole=True)
            copy.settle()  # After the last word was taken, and before the stream ends well: the promise needs both.
        except BaseException as error:
            copy.stopped.set()
            await asyncio.shield(asyncio.to_thread(held.memory.wipe))
            told = told_of_source(error)
            if told is None:
                raise
            raise told from error
        finally:
            if stalled is not None:
                stalled.cancel()
            await errand.finish(copy.close)


def require_segment_size(size: int) -> None:
    """Raises ``Misuse`` (``BAD_SEGMENT_SIZE``)."""
    if size not in SEGMENT_SIZES.values():
        sizes = " or ".join(str(each) for each in sorted(SEGMENT_SIZES.values()))
        raise Misuse("BAD_SEGMENT_SIZE", f"the agent opens objects cut every {sizes} bytes")


def told_of_source(error: BaseException) -> Misuse | None:
    """What the caller hears where it is the caller's file that is not the object that the caller named."""
    if isinstance(error, HostileInput):
        return Misuse(error.slug, error.message)
    if isinstance(error, OSError):
        return Misuse("SOURCE_UNREADABLE", "the sealed object's file cannot be read")
    return None
