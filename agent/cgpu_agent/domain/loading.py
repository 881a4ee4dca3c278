"""Opens sealed objects into a GPU's memory: neither their key nor their plaintext come to the caller.

Every segment is opened in private memory and goes over the channel when its tag fits. The object is there when its
transfer has ended well; whatever ends it otherwise overwrites what had got there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.channel import GpuChannel
from cgpu_agent.domain.channels import Channels
from cgpu_agent.domain.errand import Errand
from cgpu_agent.domain.leases import Lease, Leases, Process
from cgpu_agent.domain.opening import require_segment_size, told_of_source
from cgpu_agent.domain.quota import InFlight
from cgpu_agent.domain.release import Begin, Release
from cgpu_agent.domain.transfers import Allocation, Transfer, told
from cgpu_agent.errors import AgentError, Misuse, Unavailable
from cgpu_agent.objects.file import SealedFile
from cgpu_agent.transfer.memory import PrivateMemory
from cgpu_agent.wire.sealed import ObjectName

LOADS: Final = 8
LOADS_PER_UID: Final = 2
PIECE: Final = 4 << 20
STEP_SECONDS: Final = 60.0

logger = logging.getLogger(__name__)


class _Object:
    """The thread's side: one object, from its file into private memory, two pieces in turn."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._fd: int | None = None
        self._file: SealedFile | None = None
        self._pieces = [PrivateMemory(PIECE, lock=True) for _ in range(2)]

    def open(self, secret: bytes, name: ObjectName, segment_size: int) -> int:
        """Verify the object's end. Returns its size in bytes."""
        self._fd = self._lease.source()
        self._file = SealedFile(self._fd, secret, name, segment_size)
        return self._file.size

    def read(self, start: int, size: int) -> memoryview:
        """Verified plaintext. It stays until the call after the next."""
        if self._file is None:
            raise ValueError("the object was not opened")
        out = self._pieces[start // PIECE % 2].view[:size]
        self._file.read_into(start, out)
        return out

    def close(self) -> None:
        """Forget the plaintext that is still here. May wait for a file system of the caller's."""
        self._file = None
        for piece in self._pieces:
            piece.wipe()
        if self._fd is not None:
            os.close(self._fd)


class Loading:
    """Loads for everybody.

    Args:
        release: gives out the keys, by policy and on record.
        leases: with which the objects' files come.
    """

    def __init__(self, release: Release, leases: Leases, channels: Channels) -> None:
        self._release = release
        self._leases = leases
        self._channels = channels
        self._slots = InFlight(LOADS_PER_UID, LOADS)
        self._feeding: set[asyncio.Task[None]] = set()

    async def load(
        self,
        caller: Caller,
        process: Process,
        channel: bytes,
        lease: bytes,
        name: ObjectName,
        segment_size: int,
        handle: int,
        begin: Begin,
    ) -> Transfer:
        """Begin to load the object that came with the lease into an allocation; goes on when this has returned.

        Args: as ``Opening.open`` and ``Channels.submit``.

        Raises:
            Misuse: ``BAD_SEGMENT_SIZE``, ``NO_SOURCE``, ``SOURCE_UNREADABLE``, ``LEASE_KIND``, ``NO_ALLOCATION``,
                ``DEVICE_RANGE``: the object does not fit; all reasons of ``SealedFile``.
            Denied: ``NO_LEASE``, ``NO_CHANNEL``.
            Exhausted: ``TOO_MANY_CALLS``, ``LEASE_BUSY``, ``TRANSFER_QUEUE``.
            Unavailable: ``TRUST_CHANGED``, ``SOURCE_LOST``, ``SOURCE_STALLED``; why the channel has ended.
            All that ``Release.load`` raises.
        """
        require_segment_size(segment_size)
        target = self._channels.of(process, channel)
        target.require_open()
        room = target.room(handle)
        # Slot and lease are given back when the thread has ended, and nothing can touch either any more.
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(self._slots.hold(caller.uid))
            held = stack.enter_context(self._leases.borrowed(lease, process))
            source = _Object(held)
            errand = Errand(stack.close)
        except BaseException:
            stack.close()
            raise
        try:
            secret, still = await self._release.load(caller, name, target.gpu, begin)
            opened = partial(source.open, secret, name, segment_size)
            del secret
            total = await errand.run(opened, STEP_SECONDS)
            del opened
            if total > room.size:
                raise Misuse("DEVICE_RANGE", "the object does not fit into the allocation")
            still()
            transfer = target.begin(total)
        except BaseException as error:
            await errand.finish(source.close)
            mine = told_of_source(error)
            if mine is None:
                raise
            raise mine from error
        room.secret = True  # from before its first byte is there
        transfer.begin()
        feeding = asyncio.get_running_loop().create_task(self._feed(target, room, transfer, source, errand, still))
        self._feeding.add(feeding)
        feeding.add_done_callback(self._feeding.discard)
        return transfer

    async def _feed(
        self,
        channel: GpuChannel,
        room: Allocation,
        transfer: Transfer,
        source: _Object,
        errand: Errand,
        still: Callable[[], None],
    ) -> None:
        failure: AgentError | None = Unavailable("TRANSFER_STOPPED", "loading the object was cut short")

        def read(start: int) -> Awaitable[memoryview]:
            return errand.run(partial(source.read, start, min(PIECE, transfer.total - start)), STEP_SECONDS)

        try:
            data = await read(0)
            while data:
                start = transfer.done
                still()
                following = read(start + len(data))  # while this one goes over the channel
                _, data = await asyncio.gather(channel.write(room, start, data), following)
                transfer.done = min(start + PIECE, transfer.total)
            still()
            failure = None
        except AgentError as error:
            failure = told_of_source(error) or told(error)
        except OSError as error:
            failure = told_of_source(error)
        except Exception:
            logger.exception("loading an object failed")
            failure = AgentError("INTERNAL", "the transfer failed within the agent")
        finally:
            await errand.finish(source.close)
            if failure is not None:
                await self._wipe(channel, room, min(transfer.done + PIECE, transfer.total))
            channel.end(transfer, failure)

    async def _wipe(self, channel: GpuChannel, room: Allocation, size: int) -> None:
        """Overwrite what had got there; where that cannot be, the channel ends, and the GPU wipes."""
        zeros = memoryview(bytes(PIECE))
        try:
            for start in range(0, size, PIECE):
                await channel.write(room, start, zeros[: min(PIECE, size - start)])
        except AgentError as error:
            if error.slug != "NO_ALLOCATION":  # freed meanwhile, and wiped with that
                channel.give_up(error)
