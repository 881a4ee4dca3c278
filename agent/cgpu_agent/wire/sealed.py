"""Sealed objects: header and segments of Tink's streaming AEAD (AES256-GCM-HKDF) as arithmetic, and objects' names.

Layout (https://developers.google.com/tink/streaming-aead/aes_gcm_hkdf_streaming):

    object    = header || segment 0 || ... || segment n-1, cut every ``segment_size`` bytes, header included
    header    = 28 (its own length, 40) || salt, 32 bytes || nonce prefix, 7 bytes
    segment i = AES-256-GCM(nonce = prefix || i, u32be || 01 for the last, else 00; no AAD), then its tag, 16 bytes
    its key   = HKDF-SHA256(key, salt = salt, info = associated data), 32 bytes

A plaintext is cut in one way only: all segments but the last are full, and only an empty object's is empty.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.reader import Reader

KEY_SIZE: Final = 32
SALT_SIZE: Final = 32
PREFIX_SIZE: Final = 7
HEADER_SIZE: Final = 1 + SALT_SIZE + PREFIX_SIZE
TAG_SIZE: Final = 16
MAX_SEGMENTS: Final = 1 << 32
SEGMENT_SIZES: Final = {"1MiB": 1 << 20, "4KiB": 1 << 12}
"""Tink's templates ``AES256_GCM_HKDF_1MB`` and ``AES256_GCM_HKDF_4KB``. An object does not say which was used."""

_CONTEXT = b"cgpu/object/1\0"
_ID = re.compile(r"[!-~]{1,255}")
_MAX_VERSION = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What an object is bound to, so that no other under the same key, and no earlier version, passes for it.

    Attributes:
        key_id, object_id: 1 to 255 printable ASCII characters without spaces.
        version: 1 to 2^64 - 1, raised by the owner with each new content.

    Raises ``Misuse`` (``BAD_OBJECT_NAME``).
    """

    key_id: str
    object_id: str
    version: int

    def __post_init__(self) -> None:
        for what, value in (("key id", self.key_id), ("object id", self.object_id)):
            if not _ID.fullmatch(value):
                raise Misuse("BAD_OBJECT_NAME", f"the {what} has 1 to 255 printable ASCII characters, no spaces")
        if not 1 <= self.version <= _MAX_VERSION:
            raise Misuse("BAD_OBJECT_NAME", f"the object version is 1 to {_MAX_VERSION}")

    def associated_data(self) -> bytes:
        """``cgpu/object/1``, a zero byte; key id, object id and version (u64be), each after its length, u16be."""
        parts = (self.key_id.encode("ascii"), self.object_id.encode("ascii"), self.version.to_bytes(8, "big"))
        return _CONTEXT + b"".join(len(part).to_bytes(2, "big") + part for part in parts)


@dataclass(frozen=True, slots=True)
class Header:
    """The first ``HEADER_SIZE`` bytes of an object; not secret, and fresh for every object."""

    salt: bytes
    prefix: bytes

    @classmethod
    def fresh(cls) -> Header:
        return cls(secrets.token_bytes(SALT_SIZE), secrets.token_bytes(PREFIX_SIZE))

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """Raises ``HostileInput``: ``TRUNCATED``, ``TRAILING_BYTES``, ``BAD_FORMAT`` (not of an AES-256 object)."""
        reader = Reader(data, "sealed object")
        if reader.u8("header length") != HEADER_SIZE:
            raise reader.fail("BAD_FORMAT", f"its header does not say that it has {HEADER_SIZE} bytes")
        header = cls(reader.take(SALT_SIZE, "salt"), reader.take(PREFIX_SIZE, "nonce prefix"))
        reader.end()
        return header

    def encode(self) -> bytes:
        return bytes([HEADER_SIZE]) + self.salt + self.prefix

    def nonce(self, index: int, *, last: bool) -> bytes:
        """The nonce of segment ``index``. Raises ``Misuse`` (``OBJECT_TOO_LARGE``) past the last there can be."""
        if index >= MAX_SEGMENTS:
            raise Misuse("OBJECT_TOO_LARGE", f"a sealed object has at most {MAX_SEGMENTS} segments")
        return self.prefix + index.to_bytes(4, "big") + bytes([last])


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a segment lies.

    Attributes:
        offset, size: in the object, tag included, header excluded; bytes.
        plain_offset: of its first byte in the plaintext; bytes.
    """

    index: int
    last: bool
    offset: int
    size: int
    plain_offset: int

    @property
    def plain_size(self) -> int:
        return self.size - TAG_SIZE


@dataclass(frozen=True, slots=True)
class Layout:
    """How a plaintext is cut.

    Attributes:
        segment_size: bytes of a full segment with its tag; the first shares it with the header.
        plain_size: bytes of plaintext.

    Raises ``Misuse`` (``BAD_SEGMENT_SIZE``, ``OBJECT_TOO_LARGE``).
    """

    segment_size: int
    plain_size: int

    def __post_init__(self) -> None:
        if not HEADER_SIZE + TAG_SIZE < self.segment_size < 1 << 31:
            raise Misuse(
                "BAD_SEGMENT_SIZE", f"a segment has more than {HEADER_SIZE + TAG_SIZE} bytes, less than 2 GiB"
            )
        if self.segments > MAX_SEGMENTS:
            raise Misuse("OBJECT_TOO_LARGE", f"a sealed object has at most {MAX_SEGMENTS} segments")

    @classmethod
    def of_sealed(cls, segment_size: int, sealed_size: int) -> Layout:
        """From an object's size. Raises ``HostileInput``: ``TRUNCATED`` (no plaintext gives it), ``TOO_LARGE``."""
        cls(segment_size, 0)  # refuses an impossible segment size
        count = -(-sealed_size // segment_size)
        if count > MAX_SEGMENTS:
            raise HostileInput("TOO_LARGE", f"sealed object: more than {MAX_SEGMENTS} segments")
        plain_size = sealed_size - HEADER_SIZE - TAG_SIZE * count
        if plain_size >= 0:
            layout = cls(segment_size, plain_size)
            if layout.sealed_size == sealed_size:
                return layout
        raise HostileInput("TRUNCATED", f"sealed object: no whole object has {sealed_size} bytes")

    @property
    def _step(self) -> int:
        """Plaintext bytes of a full segment; in the first the header takes ``HEADER_SIZE`` of them."""
        return self.segment_size - TAG_SIZE

    @property
    def segments(self) -> int:
        """How many there are: at least one."""
        return -(-(HEADER_SIZE + self.plain_size) // self._step)

    @property
    def sealed_size(self) -> int:
        """Bytes of the object."""
        return HEADER_SIZE + self.plain_size + TAG_SIZE * self.segments

    def segment(self, index: int) -> Segment:
        """Segment ``index``, from 0. Raises ``ValueError`` where there is none."""
        if not 0 <= index < self.segments:
            raise ValueError(f"there are {self.segments} segments")
        offset = max(HEADER_SIZE, index * self.segment_size)
        end = min((index + 1) * self.segment_size, self.sealed_size)
        plain_offset = max(0, index * self._step - HEADER_SIZE)
        return Segment(index, index == self.segments - 1, offset, end - offset, plain_offset)

    def segment_of(self, plain_offset: int) -> Segment:
        """The segment that holds a byte of the plaintext. Raises ``ValueError`` past its end."""
        return self.segment((HEADER_SIZE + plain_offset) // self._step)
