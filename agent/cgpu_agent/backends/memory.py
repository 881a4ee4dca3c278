"""Memory that the agent shares with one caller: written here, read there, and never used for anybody else.

The size is sealed, so a page of the mapping always has a file behind it: a write past a file that somebody cut would
end the daemon (SIGBUS). The caller gets a descriptor to read by only; that it cannot write is a convenience and
nothing rests on it, because the agent never reads what is there.

Memory can outlive the agent, in systemd's keeping. Whether it was being filled when the agent died is in the file's
mode, which nothing but the agent and root can change, and which is never apart from the memory that it speaks of.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path
from typing import Final

from cgpu_agent.errors import Unavailable

MFD_NOEXEC_SEAL: Final = 8
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SETTLED: Final = 0o400
"""The file's mode while what is in the memory is whole."""
_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK)
_FILLING: Final = 0


class SharedMemory:
    """Fresh memory, all of it there from the start. Any thread may use it.

    A *turn* is the right to write: ``begin`` gives out a new one, and ends the one before. So whoever is late, on a
    thread that nobody could stop, writes nothing. What was written is good once the turn is settled.

    Args:
        size: bytes, at least 1.
        kept: a descriptor of such memory, instead of fresh one: see ``keptmemory``.

    Raises ``Unavailable`` (``NO_MEMORY``).
    """

    def __init__(self, size: int, kept: int | None = None) -> None:
        self.size: Final = size
        self._lock = threading.Lock()
        self._turn = 0
        self._written = 0 if kept is None else size
        self._closed = False
        self._reader: int | None = None
        try:
            self._fd = fresh(size) if kept is None else kept
            try:
                self._map = mmap.mmap(self._fd, size)
                if kept is None:
                    self._reader = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise Unavailable(
                "NO_MEMORY", "this machine has no memory for that lease now", retry_after=5.0
            ) from error
        self._map.madvise(mmap.MADV_DONTDUMP)

    @property
    def kept_by(self) -> int:
        """The descriptor by which the memory can be kept beyond this process; stays this object's."""
        return self._fd

    def take_descriptor(self) -> int:
        """The descriptor for the caller, once; its owner closes it."""
        fd, self._reader = self._reader, None
        if fd is None:
            raise ValueError("the descriptor was taken")
        return fd

    def begin(self) -> int:
        """A turn at writing, in memory that is all zeros."""
        with self._lock:
            self._wipe()
            if not self._closed:
                os.fchmod(self._fd, _FILLING)
            return self._turn

    def settle(self, turn: int) -> None:
        """What was written is whole, and may outlive the agent. Raises as ``write``."""
        with self._lock:
            self._require(turn)
            os.fchmod(self._fd, SETTLED)

    def write(self, turn: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write at ``offset``. Raises ``Unavailable`` (``LEASE_GONE``) when the turn, or the memory, has ended."""
        with self._lock:
            self._require(turn)
            end = offset + len(data)
            if not 0 <= offset <= end <= self.size:
                raise ValueError("outside of the memory")
            self._written = max(self._written, end)  # Before: a copy that fails in its middle is wiped, too.
            self._map[offset:end] = data

    def wipe(self) -> None:
        """End the turn, and leave nothing of what was written."""
        with self._lock:
            self._wipe()

    def close(self) -> None:
        """Wipe, and give the memory back to the kernel, also from under a caller that keeps its descriptor."""
        with self._lock:
            if self._closed:
                return
            self._wipe()
            self._closed = True
            discard(self._map)
            self._map.close()
            os.close(self._fd)
            if self._reader is not None:
                os.close(self._reader)

    def _require(self, turn: int) -> None:
        if self._closed or turn != self._turn:
            raise Unavailable("LEASE_GONE", "the lease ended while it was being filled")

    def _wipe(self) -> None:
        self._turn += 1
        if self._closed:
            return
        wipe(self._map, self._written)
        self._written = 0
        os.fchmod(self._fd, SETTLED)


def fresh(size: int, mode: int = SETTLED) -> int:
    """A descriptor of new memory, all of it there, its size sealed. Raises ``OSError``."""
    if size > _available() // 2:  # the kernel does not refuse: it ends a process to make room
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    fd = _create()
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)  # A page that is missing later would be a fault instead of an error.
        os.fchmod(fd, mode)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def wipe(memory: mmap.mmap, size: int) -> None:
    """Overwrite the first ``size`` bytes with zeros."""
    for start in range(0, size, _CHUNK):
        end = min(start + _CHUNK, size)
        memory[start:end] = _ZEROS[: end - start]


def discard(memory: mmap.mmap) -> None:
    """Give the pages back to the kernel, also from under whoever else has the file: he sees zeros."""
    for start in range(0, len(memory), 16 * _CHUNK):
        memory.madvise(mmap.MADV_REMOVE, start, min(16 * _CHUNK, len(memory) - start))


def _available() -> int:
    """Bytes that can be had without swapping, by the kernel's own estimate."""
    for line in Path("/proc/meminfo").read_bytes().splitlines():
        if line.startswith(b"MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _create() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("cgpu-lease", flags | MFD_NOEXEC_SEAL)
    except OSError:  # before Linux 6.3
        return os.memfd_create("cgpu-lease", flags)
