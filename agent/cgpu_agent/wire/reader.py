"""A bounds-checked cursor: the one place where attacker-controlled lengths are believed or refused."""

from __future__ import annotations

from typing import Final, Literal

from cgpu_agent.errors import HostileInput

Endian = Literal["big", "little"]


class Reader:
    """Reads a byte string from front to back.

    Every read past the end raises ``HostileInput`` with slug ``TRUNCATED``; nothing is ever read twice.

    Args:
        data: the bytes to read.
        what: name of the structure, for messages ("TPMS_ATTEST").
        endian: byte order of integers; TPM structures are big-endian, event logs little-endian.
    """

    __slots__ = ("_data", "_pos", "_what", "endian")

    def __init__(self, data: bytes, what: str, endian: Endian = "big") -> None:
        self._data: Final = bytes(data)
        self._pos = 0
        self._what = what
        self.endian: Endian = endian

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._pos

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._pos

    def take(self, count: int, field: str) -> bytes:
        """Return the next ``count`` bytes."""
        if count < 0 or count > self.remaining:
            raise HostileInput(
                "TRUNCATED",
                f"{self._what}: {field} needs {count} bytes at offset {self._pos}, {self.remaining} are left",
            )
        start = self._pos
        self._pos += count
        return self._data[start : self._pos]

    def uint(self, size: int, field: str) -> int:
        """Return an unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.take(size, field), self.endian)

    def u8(self, field: str) -> int:
        return self.uint(1, field)

    def u16(self, field: str) -> int:
        return self.uint(2, field)

    def u32(self, field: str) -> int:
        return self.uint(4, field)

    def u64(self, field: str) -> int:
        return self.uint(8, field)

    def sized16(self, field: str, limit: int = 0xFFFF) -> bytes:
        """Return a TPM2B: a 16-bit length, then that many bytes (at most ``limit``)."""
        size = self.u16(f"{field} size")
        if size > limit:
            raise HostileInput("TOO_LARGE", f"{self._what}: {field} has {size} bytes, at most {limit} are allowed")
        return self.take(size, field)

    def rest(self) -> bytes:
        """Return everything that is left."""
        return self.take(self.remaining, "rest")

    def end(self) -> None:
        """Refuse bytes after the end of the structure (slug ``TRAILING_BYTES``)."""
        if self.remaining:
            raise HostileInput(
                "TRAILING_BYTES",
                f"{self._what}: {self.remaining} stray bytes after its end at offset {self._pos}",
            )

    def fail(self, slug: str, message: str) -> HostileInput:
        """Build (not raise) a refusal that names the structure."""
        return HostileInput(slug, f"{self._what}: {message}")
