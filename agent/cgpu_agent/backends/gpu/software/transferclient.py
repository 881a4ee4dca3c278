"""The agent's way to a software GPU's memory: allocations and channels, for as long as one SPDM session lives."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from cgpu_agent.backends.gpu.software import commands
from cgpu_agent.backends.gpu.software.requester import Session
from cgpu_agent.backends.gpu.software.transferdevice import ACCEPTED, MAX_MEMORY, TOKEN_SIZE, door_of
from cgpu_agent.errors import DeviceFault, Exhausted, HostileInput, Misuse
from cgpu_agent.transfer.channel import Channel
from cgpu_agent.transfer.duplex import STALL, ChannelName, Duplex
from cgpu_agent.transfer.ring import End, Ring, make_ring
from cgpu_agent.wire.strictjson import Fields
from cgpu_agent.wire.transfer import Direction

T = TypeVar("T")


class Transfers:
    """Memory of one GPU, and channels to it. All of it ends with the session.

    Every method raises ``DeviceFault`` as ``Session.vendor``.

    Args:
        session: open; belongs to this from now on.
        path: the GPUs' socket.
        stall: seconds that the device may take for one slot.
    """

    def __init__(self, session: Session, path: Path, *, stall: float = STALL) -> None:
        self._session: Final = session
        self._door: Final = door_of(path)
        self._stall: Final = stall
        self._turn: Final = asyncio.Lock()
        self._channels = 0

    @property
    def chain(self) -> bytes:
        """As ``Session.chain``."""
        return self._session.chain

    async def allocate(self, size: int, *, timeout: float) -> int:
        """A handle of ``size`` bytes. Raises ``Exhausted`` (``DEVICE_MEMORY``)."""
        known = size <= MAX_MEMORY  # the GPU takes a larger number for a breach of the protocol
        result = await self._ask(time.monotonic() + timeout, "allocate", size=size) if known else None
        if result is None:
            raise Exhausted("DEVICE_MEMORY", "the GPU has no room for this allocation")
        return _only(result, lambda fields: fields.integer("handle", 1, (1 << 32) - 1))

    async def free(self, handle: int, *, timeout: float) -> None:
        """Give an allocation back. Raises ``Misuse`` (``NO_ALLOCATION``)."""
        result = await self._ask(time.monotonic() + timeout, "free", handle=handle)
        if result is None or not _only(result, lambda fields: fields.boolean("freed")):
            raise Misuse("NO_ALLOCATION", "there is no such allocation in device memory")

    async def channel(self, *, timeout: float) -> Channel:
        """Open a channel, under keys that no other has. Raises ``Exhausted`` (``TRANSFER_CHANNELS``)."""
        deadline = time.monotonic() + timeout
        number = self._channels
        self._channels += 1
        result = await self._ask(deadline, "transfer", channel=number)
        if result is None:
            raise Exhausted("TRANSFER_CHANNELS", "the GPU serves as many transfer channels as it can")
        token = _only(result, lambda fields: fields.hex("token", TOKEN_SIZE, TOKEN_SIZE))
        name = ChannelName(self._session.number, number)
        end = await self._hand_over(token, deadline)
        return Channel(Duplex(end, self._session.exporter, name, Direction.TO_DEVICE, stall=self._stall))

    async def end(self, *, timeout: float) -> None:
        """End the session."""
        await self._session.end(time.monotonic() + timeout)

    async def _ask(self, deadline: float, command: str, **arguments: object) -> Fields | None:
        """``None``: the GPU has no room."""
        async with self._turn:
            answer = await self._session.vendor(commands.encode_request(command, **arguments), deadline)
        try:
            found = commands.parse_answer(answer)
        except HostileInput as error:
            raise _no_answer() from error
        if isinstance(found, Fields):
            return found
        if found != "exhausted":
            raise _no_answer()
        return None

    async def _hand_over(self, token: bytes, deadline: float) -> End:
        """Give the device a ring and both bells. Raises ``DeviceFault``: ``GPU_TIMEOUT``, ``GPU_DRIVER``."""
        lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        fds: list[int] = []
        try:
            fds.append(make_ring())
            fds += [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
            ring_fd, theirs, ours = fds
            ring = Ring(ring_fd)
            try:
                await asyncio.wait_for(self._offer(lifeline, token, fds), max(0.0, deadline - time.monotonic()))
            except BaseException:
                ring.close()
                raise
        except BaseException as error:
            lifeline.close()
            for fd in fds:
                os.close(fd)
            if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
                raise DeviceFault("GPU_TIMEOUT", "the GPU did not take the ring in time", retry_after=1.0) from error
            if isinstance(error, OSError):
                raise DeviceFault("GPU_DRIVER", "the GPU's driver does not take rings", retry_after=1.0) from error
            raise
        os.close(ring_fd)
        return End(ring, ours, theirs, lifeline)

    async def _offer(self, lifeline: socket.socket, token: bytes, fds: list[int]) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(lifeline, str(self._door))
        socket.send_fds(lifeline, [token], fds)
        if await loop.sock_recv(lifeline, 1) != ACCEPTED:
            raise DeviceFault("GPU_DRIVER", "the GPU does not take this ring")


def _only(result: Fields, read: Callable[[Fields], T]) -> T:
    """What ``read`` finds, if that is all there is. Raises ``DeviceFault`` (``GPU_ERROR``)."""
    try:
        found = read(result)
        result.end()
    except HostileInput as error:
        raise _no_answer() from error
    return found


def _no_answer() -> DeviceFault:
    return DeviceFault("GPU_ERROR", "the GPU sent something that is no answer")
