"""The device's end of encrypted transfers: its memory, the door where rings come in, a thread for each channel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cgpu_agent.backends.gpu.software import commands
from cgpu_agent.errors import AgentError, HostileInput
from cgpu_agent.transfer.duplex import ChannelName, Duplex
from cgpu_agent.transfer.memory import PrivateMemory, copy
from cgpu_agent.transfer.ring import End, Ring
from cgpu_agent.wire.strictjson import Fields
from cgpu_agent.wire.transfer import MAX_CHANNEL, SLOT_SIZE, Direction, Kind, Refusal, SlotHeader, unpack

MAX_MEMORY: Final = 256 << 20
"""Bytes that one session may allocate, and the largest allocation."""
MAX_ALLOCATIONS: Final = 64
MAX_CHANNELS: Final = 16
"""Channels of one session at a time."""
TOKEN_SIZE: Final = 16
ACCEPTED: Final = b"\1"

_PATIENCE: Final = 5.0  # seconds between connecting to the door and handing a ring in
_MAX_GUESTS: Final = 64


def door_of(path: Path) -> Path:
    """The socket that takes rings, of GPUs that listen at ``path``."""
    return path.with_name(path.name + ".rings")


class Allocation(PrivateMemory):
    """Memory of one session, which only its channels see.

    Attributes:
        guard: held by a channel that opens a slot into it, until the tag was verified, and by one that reads it.
    """

    __slots__ = ("guard",)

    def __init__(self, size: int) -> None:
        super().__init__(size, lock=False)
        self.guard: Final = threading.Lock()


class DeviceMemory:
    """The allocations of one session."""

    def __init__(self) -> None:
        self._allocations: Final[dict[int, Allocation]] = {}
        self._last = 0

    def allocate(self, size: int) -> int | None:
        """A handle; ``None`` where there is no room."""
        taken = sum(len(each) for each in self._allocations.values())
        if len(self._allocations) >= MAX_ALLOCATIONS or taken + size > MAX_MEMORY:
            return None
        self._last += 1
        self._allocations[self._last] = Allocation(size)
        return self._last

    def free(self, handle: int) -> bool:
        """Whether there was one. A transfer that is using it ends as it would have; the memory goes then."""
        return self._allocations.pop(handle, None) is not None

    def find(self, handle: int, offset: int, size: int) -> Allocation | Refusal:
        """The allocation, if all of a range is within it."""
        found = self._allocations.get(handle)
        if found is None:
            return Refusal.NO_ALLOCATION
        return found if offset + size <= len(found) else Refusal.BAD_RANGE


class Peer:
    """Serves one channel in a thread of its own, until anything goes wrong or it is stopped."""

    def __init__(self, duplex: Duplex, memory: DeviceMemory) -> None:
        self._duplex: Final = duplex
        self._memory: Final = memory
        self._last = 0
        self._thread: Final = threading.Thread(target=self._serve, name="transfer", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Have it end soon; from any thread."""
        self._duplex.end.stop()

    def _serve(self) -> None:
        work = {Kind.WRITE: self._write, Kind.PACKED: self._packed, Kind.READ: self._read}
        # This end has nobody to tell: it hangs up, and the other one notices.
        with contextlib.suppress(AgentError, OSError):
            try:
                while True:
                    found = self._duplex.opener.receive(patient=True)
                    if found.transfer <= self._last:
                        raise HostileInput("BAD_TRANSFER", "the number of a transfer was used before")
                    self._last = found.transfer
                    work[Kind(found.kind)](found)
            finally:
                self._duplex.kill()

    def _write(self, found: SlotHeader) -> None:
        """The first slot decides for the whole transfer; one that is refused is taken all the same, and dropped.

        Who chose the place of the first is not known before it is open, so that is done in staging. Of the others
        everything is known: they are opened where they are to be, which the transfer was to overwrite anyway.
        """
        opener = self._duplex.opener
        place = self._memory.find(found.handle, found.offset, found.left)
        if isinstance(place, Allocation):
            copy(place.address + found.offset, opener.address, found.length)
        guard = contextlib.nullcontext() if isinstance(place, Refusal) else place.guard
        transfer, offset, left = found.transfer, found.offset + found.length, found.left - found.length
        while left:
            size = min(left, SLOT_SIZE)
            into = None if isinstance(place, Refusal) else place.view[offset : offset + size]
            opener.expect(
                Kind.WRITE, transfer, size, handle=found.handle, offset=offset, left=left, into=into, guard=guard
            )
            offset += size
            left -= size
        self._answer(place, transfer)

    def _packed(self, found: SlotHeader) -> None:
        opener = self._duplex.opener
        pieces = unpack(opener.plain(found.length), found.detail)
        places = [self._memory.find(piece.handle, piece.offset, piece.length) for piece in pieces]
        refusal = next((place for place in places if isinstance(place, Refusal)), None)
        for piece, place in zip(pieces, places, strict=True):
            if refusal is None and isinstance(place, Allocation):
                copy(place.address + piece.offset, opener.address + piece.start, piece.length)
        self._answer(refusal, found.transfer)

    def _read(self, found: SlotHeader) -> None:
        place = self._memory.find(found.handle, found.offset, found.left)
        if isinstance(place, Refusal) or not found.left:
            self._answer(Refusal.BAD_RANGE if isinstance(place, Allocation) else place, found.transfer)
            return
        offset, left = found.offset, found.left
        while left:
            piece = place.view[offset : offset + min(left, SLOT_SIZE)]
            self._duplex.sealer.send(
                Kind.DATA, found.transfer, piece, handle=found.handle, offset=offset, left=left, guard=place.guard
            )
            offset += len(piece)
            left -= len(piece)

    def _answer(self, outcome: Allocation | Refusal | None, transfer: int) -> None:
        if isinstance(outcome, Refusal):
            self._duplex.sealer.send(Kind.REFUSED, transfer, detail=outcome)
        else:
            self._duplex.sealer.send(Kind.DONE, transfer)


class Door:
    """Takes rings from whoever shows a token that was handed out in an SPDM session, sealed.

    A stranger who takes a ring's place can stop a channel, as any host can, and learns nothing.
    """

    def __init__(self) -> None:
        self._expected: Final[dict[bytes, Callable[[socket.socket, list[int]], None]]] = {}
        self._guests: Final[set[asyncio.Task[None]]] = set()

    def expect(self, take: Callable[[socket.socket, list[int]], None]) -> bytes:
        """A token, good for one ring. ``take`` owns what it is given: connection, ring, eventfds, raising or not."""
        token = secrets.token_bytes(TOKEN_SIZE)
        self._expected[token] = take
        return token

    def forget(self, token: bytes) -> None:
        """The token is good for nothing any more. Idempotent."""
        self._expected.pop(token, None)

    async def serve(self, listener: socket.socket) -> None:
        """Take rings for ever. ``listener``: SEQPACKET, listening, not blocking."""
        loop = asyncio.get_running_loop()
        while True:
            guest, _ = await loop.sock_accept(listener)
            if len(self._guests) >= _MAX_GUESTS:
                guest.close()
                continue
            task = loop.create_task(self._welcome(guest))
            self._guests.add(task)
            task.add_done_callback(self._guests.discard)

    async def _welcome(self, guest: socket.socket) -> None:
        fds: list[int] = []
        try:
            await asyncio.wait_for(_readable(guest), _PATIENCE)
            token, fds, _, _ = socket.recv_fds(guest, TOKEN_SIZE + 1, 3, socket.MSG_CMSG_CLOEXEC)
            take = self._expected.pop(token, None) if len(fds) == 3 else None
        except (OSError, asyncio.TimeoutError, TimeoutError):
            take = None
        if take is None:
            _close(guest, fds)
            return
        with contextlib.suppress(AgentError, OSError):
            take(guest, fds)


class TransferSession:
    """What an SPDM session can be asked beside what the GPU answers to anybody: memory, and channels to it.

    Args:
        number: of the session.
        exporter: its Export Master Secret.
        door: where rings come in.
        otherwise: answers any other request.
    """

    def __init__(self, number: int, exporter: bytes, door: Door, otherwise: Callable[[bytes], bytes]) -> None:
        self._number: Final = number
        self._exporter: Final = bytearray(exporter)
        self._door: Final = door
        self._otherwise: Final = otherwise
        self._memory: Final = DeviceMemory()
        self._tokens: Final[set[bytes]] = set()
        self._next_channel = 0
        self._peers: list[Peer] = []

    def vendor(self, payload: bytes) -> bytes:
        """Answer a request that came sealed. Raises ``HostileInput``."""
        known: dict[str, Callable[[Fields], dict[str, object] | None]] = {
            "allocate": self._allocate,
            "free": self._free,
            "transfer": self._transfer,
        }
        name, arguments = commands.parse_request(payload)
        if name not in known:
            return self._otherwise(payload)
        result = known[name](arguments)
        return commands.encode_fault("exhausted") if result is None else commands.encode_result(result)

    def close(self) -> None:
        """The session is over, and its channels with it."""
        for token in self._tokens:
            self._door.forget(token)
        for peer in self._peers:
            peer.stop()
        self._exporter[:] = bytes(len(self._exporter))

    def _allocate(self, arguments: Fields) -> dict[str, object] | None:
        size = arguments.integer("size", 1, (1 << 64) - 1)
        arguments.end()
        handle = self._memory.allocate(size)
        return None if handle is None else {"handle": handle}

    def _free(self, arguments: Fields) -> dict[str, object]:
        handle = arguments.integer("handle", 0, (1 << 32) - 1)
        arguments.end()
        return {"freed": self._memory.free(handle)}

    def _transfer(self, arguments: Fields) -> dict[str, object] | None:
        """Channels are numbered upwards: a number that comes twice would mean a key that comes twice."""
        channel = arguments.integer("channel", 0, MAX_CHANNEL)
        arguments.end()
        if channel < self._next_channel:
            raise HostileInput("BAD_CHANNEL", "this number was a channel's before")
        self._peers = [peer for peer in self._peers if peer.alive]
        if len(self._peers) + len(self._tokens) >= MAX_CHANNELS:
            return None
        self._next_channel = channel + 1
        name = ChannelName(self._number, channel)

        def take(lifeline: socket.socket, fds: list[int]) -> None:
            self._tokens.discard(token)
            self._open(name, lifeline, fds)

        token = self._door.expect(take)
        self._tokens.add(token)
        return {"token": token.hex()}

    def _open(self, name: ChannelName, lifeline: socket.socket, fds: list[int]) -> None:
        ring_fd, ours, theirs = fds
        try:
            for bell in (ours, theirs):
                os.set_blocking(bell, False)
            lifeline.setblocking(False)
            ring = Ring(ring_fd)
        except BaseException:
            _close(lifeline, fds)
            raise
        os.close(ring_fd)
        duplex = Duplex(End(ring, ours, theirs, lifeline), self._exporter, name, Direction.TO_HOST)
        peer = Peer(duplex, self._memory)
        self._peers.append(peer)
        peer.start()  # from here on it lets go of everything, whatever happens
        with contextlib.suppress(OSError):
            lifeline.send(ACCEPTED)


def listen(path: Path) -> socket.socket:
    """A socket on which rings are taken, in the place of one that a killed process left behind."""
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_reader(connection, came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(connection)


def _close(connection: socket.socket, fds: Sequence[int]) -> None:
    connection.close()
    for fd in fds:
        os.close(fd)
