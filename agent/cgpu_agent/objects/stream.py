"""Sealing and opening as a stream: any length, the memory of two segments, and nothing let out unverified."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from typing import BinaryIO

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.objects.cipher import SegmentCipher
from cgpu_agent.wire.sealed import HEADER_SIZE, TAG_SIZE, Header, Layout, ObjectName


class _Stream(ABC):
    """Cuts what is written into pieces. A piece is passed on when more follows it, so that the last one is known.

    After an exception the stream is dead: what the sink holds by then is a part, and stays one.
    """

    def __init__(self, sink: BinaryIO, segment_size: int) -> None:
        Layout(segment_size, 0)  # refuses an impossible size
        self._sink = sink
        self._segment_size = segment_size
        self._index = 0
        self._buffer = memoryview(bytearray(segment_size))
        self._held = 0
        self._out = memoryview(bytearray(segment_size))
        self._dead = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take more input. Raises what the sink raises."""
        self._begin()
        rest = memoryview(data).cast("B")
        while rest:
            size = self._piece_size()
            if self._held == size:
                self._pass_on(self._buffer[:size], last=False)
                self._held = 0
            elif not self._held and len(rest) > size:
                self._pass_on(rest[:size], last=False)
                rest = rest[size:]
            else:
                count = min(len(rest), size - self._held)
                self._buffer[self._held : self._held + count] = rest[:count]
                self._held += count
                rest = rest[count:]
        self._dead = False

    def finish(self) -> None:
        """The input ends here. Without this call the output is a part only; it does not close the sink."""
        self._begin()
        self._pass_on(self._buffer[: self._held], last=True)

    def _begin(self) -> None:
        """Dead until the call has succeeded. Raises ``Misuse`` (``STREAM_ENDED``)."""
        if self._dead:
            raise Misuse("STREAM_ENDED", "the stream was finished or has failed")
        self._dead = True

    def _emit(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            count = self._sink.write(rest)
            if not count:  # not even a byte, or None: a pipe that does not wait is full
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            rest = rest[count:]

    @abstractmethod
    def _piece_size(self) -> int:
        """Bytes of the piece that is being collected, if it is not the last."""

    @abstractmethod
    def _pass_on(self, piece: memoryview, *, last: bool) -> None:
        """Turn one piece into output."""


class Sealer(_Stream):
    """Seals what is written into ``sink``.

    Raises ``Misuse``: ``BAD_KEY``, ``BAD_SEGMENT_SIZE``; when written to also ``OBJECT_TOO_LARGE``, ``STREAM_ENDED``.
    """

    def __init__(self, sink: BinaryIO, key: bytes | bytearray, name: ObjectName, segment_size: int) -> None:
        super().__init__(sink, segment_size)
        header = Header.fresh()
        self._cipher = SegmentCipher(key, name, header)
        self._emit(header.encode())

    def _piece_size(self) -> int:
        return self._segment_size - TAG_SIZE - (0 if self._index else HEADER_SIZE)

    def _pass_on(self, piece: memoryview, *, last: bool) -> None:
        out = self._out[: len(piece) + TAG_SIZE]
        self._cipher.seal(self._index, last=last, plain=piece, out=out)
        self._index += 1
        self._emit(out)


class Opener(_Stream):
    """Opens the object that is written, from private memory, into ``sink``.

    What reaches the sink is verified, but it is the whole plaintext only when ``finish`` returns.

    Raises ``Misuse`` as ``Sealer``; when written to or finished ``HostileInput``: ``BAD_FORMAT``, ``TRUNCATED``,
    ``NOT_AUTHENTIC``.
    """

    def __init__(self, sink: BinaryIO, key: bytes | bytearray, name: ObjectName, segment_size: int) -> None:
        super().__init__(sink, segment_size)
        SegmentCipher(key, name, Header.fresh())  # refuses a bad key before anything is read
        self._key, self._name = key, name
        self._cipher: SegmentCipher | None = None

    def _piece_size(self) -> int:
        if self._cipher is None:
            return HEADER_SIZE
        return self._segment_size - (0 if self._index else HEADER_SIZE)

    def _pass_on(self, piece: memoryview, *, last: bool) -> None:
        if self._cipher is None:
            self._cipher = SegmentCipher(self._key, self._name, Header.parse(bytes(piece)))
            if not last:
                return
            piece = piece[:0]
        if len(piece) < TAG_SIZE + (1 if self._index else 0):
            raise HostileInput("TRUNCATED", f"sealed object: segment {self._index} is cut short")
        out = self._out[: len(piece) - TAG_SIZE]
        self._cipher.open(self._index, last=last, sealed=piece, out=out)
        self._index += 1
        self._emit(out)
