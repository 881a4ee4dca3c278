"""Reading ranges of a sealed object in a file, by descriptor, into memory that others may see."""

from __future__ import annotations

import os
import stat

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.objects.cipher import SegmentCipher
from cgpu_agent.wire.sealed import HEADER_SIZE, Header, Layout, ObjectName, Segment


class SealedFile:
    """An object in a regular file; the descriptor stays its owner's, and its file offset is neither used nor moved.

    The last segment is verified at once, so the size is the sealed one. Others are verified when they are read. Not
    for several threads at a time.

    Raises:
        Misuse: ``NOT_A_FILE``, ``BAD_KEY``, ``BAD_SEGMENT_SIZE``.
        HostileInput: ``TRUNCATED``, ``TOO_LARGE``, ``BAD_FORMAT``, ``NOT_AUTHENTIC``.
        OSError: here and later, where the descriptor cannot be read.
    """

    def __init__(self, fd: int, key: bytes | bytearray, name: ObjectName, segment_size: int) -> None:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise Misuse("NOT_A_FILE", "a sealed object is read from a regular file")
        self._fd = fd
        self._layout = Layout.of_sealed(segment_size, info.st_size)
        self._sealed = memoryview(bytearray(min(segment_size, self._layout.sealed_size)))
        self._plain = memoryview(bytearray(len(self._sealed)))
        self._opened: int | None = None
        self._cipher = SegmentCipher(key, name, Header.parse(bytes(self._read(0, HEADER_SIZE))))
        self._open(self._layout.segment(self._layout.segments - 1))

    @property
    def size(self) -> int:
        """Bytes of plaintext, verified."""
        return self._layout.plain_size

    def read_into(self, offset: int, out: bytearray | memoryview) -> None:
        """Fill ``out`` with the plaintext from ``offset``. Whatever is written there, even on failure, is verified.

        Raises:
            Misuse: ``BAD_RANGE`` (past the end).
            HostileInput: ``TRUNCATED``, ``NOT_AUTHENTIC``.
        """
        rest = memoryview(out).cast("B")
        if offset < 0 or offset + len(rest) > self.size:
            raise Misuse("BAD_RANGE", f"the object has {self.size} bytes")
        while rest:
            segment = self._layout.segment_of(offset)
            start = offset - segment.plain_offset
            part = self._open(segment)[start : start + len(rest)]
            rest[: len(part)] = part
            rest = rest[len(part) :]
            offset += len(part)

    def _open(self, segment: Segment) -> memoryview:
        """The plaintext of a segment, in private memory until the next call."""
        plain = self._plain[: segment.plain_size]
        if self._opened != segment.index:
            self._opened = None
            sealed = self._read(segment.offset, segment.size)
            self._cipher.open(segment.index, last=segment.last, sealed=sealed, out=plain)
            self._opened = segment.index
        return plain

    def _read(self, offset: int, size: int) -> memoryview:
        """Copied out of the file first: somebody may be writing to it."""
        sealed, done = self._sealed[:size], 0
        while done < size:
            count = os.preadv(self._fd, [sealed[done:]], offset + done)
            if not count:
                raise HostileInput("TRUNCATED", "sealed object: the file became shorter while it was read")
            done += count
        return sealed
