"""The bounce ring in shared memory, and waiting at it. Everything in it is the host's to read and to write."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from cgpu_agent.errors import DeviceFault, HostileInput, Unavailable
from cgpu_agent.transfer.memory import address_of
from cgpu_agent.wire.transfer import DEPTH, RING_SIZE

RING_NAME: Final = "cgpu-transfer-ring"
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_LOOKS: Final = 150  # about a microsecond each: some slots long
_SHORT_NAP: Final = 1  # milliseconds
_LONG_NAP: Final = 64


def make_ring() -> int:
    """A descriptor of a fresh ring, whose size nobody can change any more. It is the caller's to close."""
    fd = os.memfd_create(RING_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, RING_SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Ring:
    """A mapped ring, populated; the descriptor stays its owner's.

    Raises ``HostileInput`` (``BAD_RING``): of another size, or it could shrink under us (SIGBUS).

    Attributes:
        address: where it begins.
    """

    def __init__(self, fd: int) -> None:
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:
            sealed = False
        if not sealed or os.fstat(fd).st_size != RING_SIZE:
            raise HostileInput("BAD_RING", "this is no ring of fixed size")
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._map: Final = mmap.mmap(fd, RING_SIZE, flags=flags)
        self._bytes: Final = memoryview(self._map)
        self.words: Final = self._bytes.cast("Q")
        self.address: Final = address_of(self._map)

    def filled(self, tail: int, counter: int) -> bool:
        """Whether slot ``counter`` seems to be there, by word ``tail``. Raises ``HostileInput`` (``RING_HINT``)."""
        ahead = self.words[tail] - counter
        if not 0 <= ahead <= DEPTH:
            raise HostileInput("RING_HINT", "the ring says something impossible of what it holds")
        return ahead > 0

    def room(self, head: int, counter: int) -> bool:
        """Whether slot ``counter`` seems to be free, by word ``head``. Raises ``HostileInput`` (``RING_HINT``)."""
        waiting = counter - self.words[head]
        if not 0 <= waiting <= DEPTH:
            raise HostileInput("RING_HINT", "the ring says something impossible of what was taken")
        return waiting < DEPTH

    def close(self) -> None:
        """Unmap. No address may be used any more."""
        self.words.release()
        self._bytes.release()
        self._map.close()


class End:
    """One end of a channel: the ring, the bells, and a connection that says whether the other end still lives.

    Takes over the descriptors and closes them. One thread uses it; ``stop`` is for any.

    Args:
        ring: mapped.
        ours, theirs: eventfds, the one that wakes us, which does not block, and the one that wakes the other end.
        lifeline: a connected socket on which nothing is said.
    """

    def __init__(self, ring: Ring, ours: int, theirs: int, lifeline: socket.socket) -> None:
        self.ring: Final = ring
        self._ours: Final = ours
        self._theirs: Final = theirs
        self._lifeline: Final = lifeline
        self._fence: Final = threading.Lock()
        self._guard: Final = threading.Lock()
        self._open = True
        self.stopped = False
        self._poll: Final = select.poll()
        self._poll.register(ours, select.POLLIN)
        self._poll.register(lifeline, 0)  # POLLHUP comes unasked

    def announce(self, moved: int, value: int, sleeps: int) -> None:
        """Set a hint, and wake the other end if it seems to sleep for no more than this."""
        words = self.ring.words
        words[moved] = value
        with self._fence:  # what Python has for a store-load fence: a locked instruction
            pass
        if 0 < words[sleeps] <= value:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._theirs, 1)

    def wait(self, ready: Callable[[], bool], sleeps: int, until: int, seconds: float | None) -> None:
        """Wait until ``ready``: a moment awake, then asleep.

        Args:
            sleeps: index of the hint that says so.
            until: what the other end's hint must have come to for it to be worth waking us; not 0.
            seconds: how long at most; ``None``: for as long as the other end lives.

        Raises:
            Unavailable: ``TRANSFER_STOPPED``.
            DeviceFault: ``TRANSFER_STALLED``, ``TRANSFER_PEER_GONE``.
            and what ``ready`` raises.
        """
        for _ in range(_LOOKS):
            if ready():
                return
            self._poll.poll(0)  # lets other threads run, but not other processes, who would keep the core for long
        self.ring.words[sleeps] = until
        try:
            self._sleep(ready, None if seconds is None else time.monotonic() + seconds)
        finally:
            self.ring.words[sleeps] = 0

    def _sleep(self, ready: Callable[[], bool], deadline: float | None) -> None:
        nap = _SHORT_NAP
        gone = False
        while True:
            with self._fence:
                pass
            if ready():
                return
            self.require_running()
            if gone:
                raise DeviceFault("TRANSFER_PEER_GONE", "the other end of this transfer channel is gone")
            if deadline is not None and time.monotonic() > deadline:
                raise DeviceFault("TRANSFER_STALLED", "the other end of this transfer channel does not go on")
            found = dict(self._poll.poll(nap))
            gone = self._lifeline.fileno() in found
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._ours)
            nap = min(2 * nap, _LONG_NAP)  # bounds what a lost wake-up costs

    def require_running(self) -> None:
        """Raises ``Unavailable`` (``TRANSFER_STOPPED``)."""
        if self.stopped:
            raise Unavailable("TRANSFER_STOPPED", "this transfer channel was closed")

    def stop(self) -> None:
        """Have whoever waits, or is about to, give up."""
        self.stopped = True
        with self._guard, contextlib.suppress(BlockingIOError):
            if self._open:
                os.eventfd_write(self._ours, 1)

    def close(self) -> None:
        """Unmap the ring, close all descriptors: the other end notices. Idempotent."""
        with self._guard:
            if not self._open:
                return
            self._open = False
            self.ring.close()
            os.close(self._ours)
            os.close(self._theirs)
            self._lifeline.close()
