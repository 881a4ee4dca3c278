"""Moving bytes between two sockets, one direction at a time, without ever waiting and without piling anything up."""

from __future__ import annotations

import socket
from enum import Enum

BUFFER_SIZE = 256 * 1024


class Moved(Enum):
    """Why ``Flow.move`` stopped."""

    BLOCKED = "one side would block; its next edge-triggered event goes on"
    MORE = "the budget is used up; call again, no event will come"
    ENDED = "end of file or an error: the pair is over (HTTP/2 does not use half-close)"


class Flow:
    """One direction between two non-blocking sockets.

    Back-pressure: what ``sink`` did not take is kept, and nothing more is read until it is gone. So a flow holds one
    buffer's worth at most, and end of file is seen only after everything before it was delivered.
    """

    __slots__ = ("_rest", "moved", "sink", "source")

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.moved = 0
        """Bytes delivered so far."""
        self._rest: memoryview | None = None

    @property
    def held(self) -> int:
        """Bytes read and not yet delivered."""
        rest = self._rest
        return 0 if rest is None else len(rest)

    def move(self, buffer: memoryview, budget: int, *, drain: bool = True) -> Moved:
        """Move bytes until a side would block, the source ends, or about ``budget`` bytes are moved.

        Args:
            buffer: scratch space, shared by all flows of one thread; never kept.
            budget: bytes; exceeded by one buffer at most.
            drain: read until the source would block. ``False`` lets one short read do, which saves a system call and
                is safe only where the event that led here said nothing of an end: a later one is an event of its own.
        """
        drain = drain or self._rest is not None  # an end may have been announced while the rest was waiting
        try:
            while budget > 0:
                if self._rest is None:
                    count = self.source.recv_into(buffer)
                    if count == 0:
                        return Moved.ENDED
                    budget -= self._send(buffer[:count], kept=False)
                    if not drain and count < len(buffer) and self._rest is None:
                        return Moved.BLOCKED
                else:
                    budget -= self._send(self._rest, kept=True)
        except BlockingIOError:
            return Moved.BLOCKED
        except OSError:
            return Moved.ENDED
        return Moved.MORE

    def _send(self, data: memoryview, *, kept: bool) -> int:
        """Send what the sink takes and keep the rest, which must not lie in the shared buffer."""
        try:
            sent = self.sink.send(data)
        except BlockingIOError:
            if kept:
                raise
            sent = 0
        self.moved += sent
        if sent == len(data):
            self._rest = None
        else:
            self._rest = data[sent:] if kept else memoryview(bytes(data[sent:]))
        return sent
