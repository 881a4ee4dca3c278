"""Record the frames that pass a transport and replay them later, so that tests can run without a TPM.

File format: UTF-8 text. The first line is ``tpm-frames 1``; then pairs of lines, ``> `` and the command in lower-case
hex, ``< `` and its response in lower-case hex, in the order they were exchanged. Every line ends with LF.

A recording holds every secret that was not encrypted by the TPM, auth values included: for tests only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from cgpu_agent.backends.tpm.transport import Transport, check_frame, check_response
from cgpu_agent.errors import DeviceFault, HostileInput

_MAGIC: Final = "tpm-frames 1"
_MAX_FILE: Final = 16 << 20
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})+")

Exchange = tuple[bytes, bytes]
"""A command frame and its response frame."""


class Recorder:
    """A transport that keeps a copy of what passes through it in ``exchanges``."""

    def __init__(self, inner: Transport) -> None:
        self._inner: Final = inner
        self.exchanges: Final[list[Exchange]] = []

    @property
    def exclusive(self) -> bool:
        return self._inner.exclusive

    def transact(self, command: bytes, deadline: float) -> bytes:
        frame = self._inner.transact(command, deadline)
        self.exchanges.append((command, frame))
        return frame

    def close(self) -> None:
        self._inner.close()


class Replayer:
    """A transport that answers recorded commands, in order; anything else is ``DeviceFault`` ``TPM_IO``.

    Args:
        exchanges: what a ``Recorder`` kept, perhaps altered by a test.
        exclusive: as the recorded transport was.
    """

    def __init__(self, exchanges: Iterable[Exchange], *, exclusive: bool = True) -> None:
        self._left: Final = list(exchanges)[::-1]
        self.exclusive: Final = exclusive

    def transact(self, command: bytes, deadline: float) -> bytes:  # noqa: ARG002 - a recording is never late
        check_frame(command)
        if not self._left or self._left[-1][0] != command:
            raise DeviceFault("TPM_IO", "the recording holds no answer to this command")
        _, frame = self._left.pop()
        check_response(frame)
        return frame

    def close(self) -> None:
        self._left.clear()


def dump_exchanges(exchanges: Iterable[Exchange]) -> bytes:
    """Write exchanges in the file format above."""
    lines = [_MAGIC]
    for command, response in exchanges:
        lines += [f"> {command.hex()}", f"< {response.hex()}"]
    return "".join(f"{line}\n" for line in lines).encode()


def load_exchanges(data: bytes) -> tuple[Exchange, ...]:
    """Read the file format above; frames are not checked here, so that a file may hold broken ones.

    Raises:
        HostileInput: ``BAD_RECORDING`` for anything else than that format.
    """
    if len(data) > _MAX_FILE:
        raise HostileInput("BAD_RECORDING", f"a recording of more than {_MAX_FILE} bytes")
    try:
        lines = data.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise HostileInput("BAD_RECORDING", "a recording that is not ASCII") from None
    if lines[0] != _MAGIC or lines[-1] or len(lines) % 2:
        raise HostileInput("BAD_RECORDING", f"a recording is '{_MAGIC}' and pairs of lines")
    return tuple((_frame(lines[i], "> "), _frame(lines[i + 1], "< ")) for i in range(1, len(lines) - 1, 2))


def _frame(line: str, prefix: str) -> bytes:
    if not line.startswith(prefix) or not _HEX.fullmatch(line[2:]):
        raise HostileInput("BAD_RECORDING", f"a line of a recording is not '{prefix}' and hex")
    return bytes.fromhex(line[2:])
