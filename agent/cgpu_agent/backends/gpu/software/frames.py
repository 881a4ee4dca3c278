"""How messages travel over the socket of a software GPU.

A frame is ``size u32 | endpoint u8 | kind u8 | payload``, big-endian, size without these six bytes. Endpoint 0 is the
driver (what NVML would answer), 1 and above are GPUs. Each connection has its own SPDM state with each endpoint.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.spdm12 import MAX_MESSAGE

DRIVER: Final = 0
MAX_GPUS: Final = 64
MAX_PAYLOAD: Final = MAX_MESSAGE + 64
_HEADER: Final = 6


class Kind(IntEnum):
    """What a payload is; SPDM and SECURED are numbered as MCTP numbers them (DSP0239)."""

    UNREACHABLE = 0x00
    """Answer of the bus: nothing is at this endpoint (any more). No payload."""
    SPDM = 0x05
    SECURED = 0x06


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; see the module."""

    endpoint: int
    kind: Kind
    payload: bytes

    def encode(self) -> bytes:
        return len(self.payload).to_bytes(4, "big") + bytes((self.endpoint, self.kind)) + self.payload


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; ``None`` at an orderly end.

    Raises:
        HostileInput: ``BAD_FRAME``, ``TOO_LARGE``, ``TRUNCATED``.
        OSError: the connection broke.
    """
    try:
        head = Reader(await reader.readexactly(_HEADER), "frame")
        size, endpoint, kind = head.u32("size"), head.u8("endpoint"), head.u8("kind")
        if size > MAX_PAYLOAD:
            raise head.fail("TOO_LARGE", f"{size} bytes, at most {MAX_PAYLOAD} are allowed")
        if kind not in set(Kind) or endpoint > MAX_GPUS:
            raise head.fail("BAD_FRAME", f"kind {kind} for endpoint {endpoint}")
        return Frame(endpoint, Kind(kind), await reader.readexactly(size))
    except asyncio.IncompleteReadError as error:
        if not error.partial and error.expected == _HEADER:
            return None
        raise HostileInput("TRUNCATED", "frame: the connection ended within it") from error
