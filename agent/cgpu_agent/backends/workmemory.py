"""Memory that a caller fills and reads itself, and from and to which the agent transfers.

The caller can write to it at any moment, and cannot be stopped: nothing in it is ever believed. What he cannot do is
make it smaller, so a page is always there; and the mapping stays for as long as anything here uses a part of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from typing import Final

from cgpu_agent.backends.memory import discard, fresh, wipe
from cgpu_agent.errors import Unavailable

WRITABLE: Final = 0o600
"""The file's mode, by which this memory is told from the other kind when it outlived the agent."""


class WorkMemory:
    """Fresh memory, all of it there from the start, never used for anybody else. Any thread may use it.

    Args:
        size: bytes, at least 1.
        kept: a descriptor of such memory, instead of fresh one: see ``keptmemory``. What is in it stays: it is the
            caller's own.

    Raises ``Unavailable`` (``NO_MEMORY``).
    """

    def __init__(self, size: int, kept: int | None = None) -> None:
        self.size: Final = size
        self._changed = threading.Condition()
        self._users = 0
        self._closed = False
        try:
            self._fd = fresh(size, WRITABLE) if kept is None else kept
            try:
                self._map = mmap.mmap(self._fd, size)
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
        """A descriptor for the caller, to read and to write by; its owner closes it."""
        return os.dup(self._fd)

    @contextlib.contextmanager
    def use(self, offset: int, size: int) -> Iterator[memoryview]:
        """A part of it, which stays while the block runs. Raises ``Unavailable`` (``LEASE_GONE``)."""
        with self._changed:
            if self._closed:
                raise Unavailable("LEASE_GONE", "the lease ended before the transfer did")
            self._users += 1
        try:
            if not 0 <= offset <= offset + size <= self.size:
                raise ValueError("outside of the memory")
            with memoryview(self._map) as whole, whole[offset : offset + size] as part:
                yield part
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Give the memory back to the kernel, also from under a caller who keeps his descriptor: he sees zeros.

        Waits for whoever uses a part of it; nobody else can any more. Idempotent.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
        wipe(self._map, self.size)
        discard(self._map)
        with contextlib.suppress(BufferError):  # a fault that is kept still names a part of it; the pages are gone
            self._map.close()
        os.close(self._fd)
