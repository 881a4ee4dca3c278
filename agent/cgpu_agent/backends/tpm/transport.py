"""Carry one TPM command to a TPM and bring its answer back before a deadline, as whole checked frames.

A transport is used by one thread at a time. After any failure its stream may still hold the late answer of the
failed command, so it refuses all further use: close it and make a new one.

Frame layout: TCG "TPM 2.0 Library", Part 1, 18 (tag u16, size u32, code u32). Errors: ``DeviceFault`` with slug
``TPM_TIMEOUT`` or ``TPM_IO``; the operating system's error is its cause.
"""

from __future__ import annotations

import math
import os
import re
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from cgpu_agent.errors import DeviceFault, Misuse
from cgpu_agent.wire.metrics import Histogram

HEADER_SIZE: Final = 10
MAX_FRAME: Final = 4096
_TAGS: Final = (0x8001, 0x8002)
_TRY_AGAIN_CODES: Final = (0x922, 0x908, 0x90A)
"""TPM_RC_RETRY, TPM_RC_YIELDED, TPM_RC_TESTING: send the same bytes again."""
_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.1


class Transport(Protocol):
    """Bytes to a TPM and back."""

    @property
    def exclusive(self) -> bool:
        """True when nobody else's objects live in this TPM, so that whatever is left over may be flushed."""

    def transact(self, command: bytes, deadline: float) -> bytes:
        """Send ``command`` and return the response frame before ``deadline`` (``time.monotonic`` scale)."""

    def close(self) -> None:
        """Free the stream. Idempotent."""


class Metered:
    """A transport whose exchanges are counted by the time they took."""

    def __init__(self, inner: Transport, seconds: Histogram) -> None:
        self._inner: Final = inner
        self._seconds: Final = seconds

    @property
    def exclusive(self) -> bool:
        return self._inner.exclusive

    def transact(self, command: bytes, deadline: float) -> bytes:
        begun = time.monotonic()
        try:
            return self._inner.transact(command, deadline)
        finally:
            self._seconds.add(time.monotonic() - begun)

    def close(self) -> None:
        self._inner.close()


class UnixPerCommand:
    """swtpm's data socket. One connection a command: swtpm serves one client at a time, and no answer can be late.

    Args:
        path: the socket, at most 107 bytes long.
    """

    exclusive: Final = True

    def __init__(self, path: str | Path) -> None:
        self._path: Final = os.fspath(path)
        if not fits_socket_address(self._path):
            raise Misuse("TPM_SPEC", "the TPM's socket path is longer than 107 bytes")

    def transact(self, command: bytes, deadline: float) -> bytes:
        check_frame(command)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            try:
                self._connect(stream, deadline)
                stream.settimeout(_left(deadline))
                stream.sendall(command)
                header = _receive(stream, HEADER_SIZE, deadline)
                frame = header + _receive(stream, frame_size(header) - HEADER_SIZE, deadline)
            except TimeoutError as error:
                raise timed_out() from error
            except OSError as error:
                raise _io("the TPM's socket failed") from error
        check_response(frame)
        return frame

    def close(self) -> None:
        """Nothing is kept open between commands."""

    def _connect(self, stream: socket.socket, deadline: float) -> None:
        pause = _FIRST_PAUSE
        while True:
            stream.settimeout(_left(deadline))
            try:
                stream.connect(self._path)
            except BlockingIOError:
                # The listen queue of a hung swtpm is full: it is late, not broken.
                pause = _rest(pause, deadline)
            else:
                return


class Device:
    """A TPM character device: one write a command, one read an answer, on one descriptor kept open.

    Closing the descriptor makes the kernel's resource manager flush what was loaded through it.

    The deadline is enforced by ``poll``. While the kernel runs a command it holds the lock that ``poll`` and
    ``close`` take, so a hung TPM holds this thread until the kernel's own limit for that command (Linux
    ``tpm-dev-common.c``): callers must not wait for this thread without a timer of their own.

    Args:
        source: path of the device, or an open descriptor that this object then owns. The descriptor must keep
            message boundaries.
    """

    exclusive: Final = False

    def __init__(self, source: str | Path | int) -> None:
        self._fd = -1
        if isinstance(source, int):
            self._fd = source
        else:
            try:
                # Without O_NONBLOCK the write itself would wait for the answer.
                self._fd = os.open(source, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            except OSError as error:
                raise _io("the TPM device cannot be opened") from error

    def transact(self, command: bytes, deadline: float) -> bytes:
        check_frame(command)
        if self._fd < 0:
            raise _io("the TPM device was closed after a failure")
        try:
            frame = self._exchange(command, deadline)
            check_response(frame)
        except OSError as error:
            self.close()
            raise _io("the TPM device failed") from error
        except DeviceFault:
            self.close()
            raise
        return frame

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _exchange(self, command: bytes, deadline: float) -> bytes:
        if os.write(self._fd, command) != len(command):
            raise _io("the TPM device took only a part of a command")
        ready = select.poll()
        ready.register(self._fd, select.POLLIN)
        # Rounded up: a timeout that is reported before the deadline would leave time for another attempt.
        if not ready.poll(math.ceil(_left(deadline) * 1000)):
            raise timed_out()
        return os.read(self._fd, MAX_FRAME)


def open_tpm(spec: str) -> Callable[[], Transport]:
    """Turn ``device:/dev/tpmrm0`` or ``swtpm:SOCKET`` into a factory that opens that TPM, again after each failure.

    Raises:
        Misuse: ``TPM_SPEC`` for any other text, and for ``/dev/tpmN``: without the kernel's resource manager
            a second user of the TPM would see and use our objects.
    """
    kind, _, path = spec.partition(":")
    if not path.startswith("/") or "\0" in path:
        raise Misuse("TPM_SPEC", "a TPM is named device:/dev/tpmrm0 or swtpm:/path/of/socket")
    if kind == "swtpm":
        transport = UnixPerCommand(path)
        return lambda: transport
    if kind != "device":
        raise Misuse("TPM_SPEC", "a TPM is named device:/dev/tpmrm0 or swtpm:/path/of/socket")
    if re.fullmatch(r"/dev/tpm\d+", os.path.realpath(path)):
        raise Misuse("TPM_SPEC", "use the resource-managed device (/dev/tpmrm0), not the raw one")
    return lambda: Device(path)


def converse(transport: Transport, command: bytes, deadline: float) -> bytes:
    """``transact``, sending again while the TPM asks for it; the deadline covers every repetition."""
    pause = _FIRST_PAUSE
    while True:
        frame = transport.transact(command, deadline)
        if response_code(frame) not in _TRY_AGAIN_CODES:
            return frame
        pause = _rest(pause, deadline)


def response_code(frame: bytes) -> int:
    """The TPM_RC of a checked response frame; 0 is success."""
    return int.from_bytes(frame[6:HEADER_SIZE], "big")


def frame_size(header: bytes) -> int:
    """Total size that a header announces. Raises ``DeviceFault`` ``TPM_IO`` outside 10-4096."""
    size = int.from_bytes(header[2:6], "big")
    if not HEADER_SIZE <= size <= MAX_FRAME:
        raise _io(f"a TPM frame announces {size} bytes")
    return size


def check_frame(frame: bytes) -> None:
    """Refuse bytes that are not exactly one TPM frame (``DeviceFault`` ``TPM_IO``)."""
    if not HEADER_SIZE <= len(frame) <= MAX_FRAME:
        raise _io(f"a TPM frame has {len(frame)} bytes")
    if int.from_bytes(frame[:2], "big") not in _TAGS:
        raise _io("a TPM frame has an unknown tag")
    if frame_size(frame) != len(frame):
        raise _io("a TPM frame has another size than it announces")


def check_response(frame: bytes) -> None:
    """``check_frame``, and an answer that reports an error must hold nothing else (Part 1, 18.4)."""
    check_frame(frame)
    if response_code(frame) and len(frame) != HEADER_SIZE:
        raise _io("a TPM error answer carries data")


def fits_socket_address(path: str) -> bool:
    """True when ``path`` fits sun_path with its terminating NUL."""
    return 0 < len(os.fsencode(path)) <= 107


def timed_out() -> DeviceFault:
    """Build the error of every expired deadline."""
    return DeviceFault("TPM_TIMEOUT", "the TPM did not answer in time", retry_after=1.0)


def _io(message: str) -> DeviceFault:
    return DeviceFault("TPM_IO", message, retry_after=1.0)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise timed_out()
    return left


def _rest(pause: float, deadline: float) -> float:
    time.sleep(min(pause, _left(deadline)))
    return min(2 * pause, _LONGEST_PAUSE)


def _receive(stream: socket.socket, count: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        stream.settimeout(_left(deadline))
        part = stream.recv(count - len(parts))
        if not part:
            raise _io("the TPM closed its socket in the middle of an answer")
        parts += part
    return bytes(parts)
