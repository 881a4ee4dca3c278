"""What a workload and the agent say to each other where memory is leased: one message each way.

A connection (SOCK_SEQPACKET) carries one request and one answer; descriptors travel beside them (SCM_RIGHTS). After a
grant it stays open and silent: it is the lease, which ends with it. Integers are big-endian:

    request = "cgpu/lease/1" || 00 || kind, u8 || bytes wanted, u64
              kind 0: memory to read; 1: the same, with one descriptor: of the sealed object to open;
              2: memory to read and to write
    grant   = "cgpu/lease/1" || 00 || 01 || id, 16 random bytes                      with one descriptor: the memory
    refusal = "cgpu/lease/1" || 00 || 00 || kind, u8 || ms after which to retry, u32, 0 = never
              || size, u16 || slug || size, u16 || message
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import AgentError, Denied, Exhausted, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.reader import Reader

ID_SIZE: Final = 16
MAX_MESSAGE: Final = 512
"""Longer than every good message, so that one that was cut to this size is none."""

_PLAIN, _SOURCE, _WRITABLE = 0, 1, 2
_MAGIC: Final = b"cgpu/lease/1\0"
_GRANT, _REFUSAL = 1, 0
_KINDS: Final[tuple[type[AgentError], ...]] = (Misuse, Denied, Exhausted, Unavailable)
_MAX_SLUG: Final = 64
_MAX_TEXT: Final = 256
_SLUG: Final = re.compile(rb"[A-Z][A-Z0-9_]*")
_TEXT: Final = re.compile(rb"[ -~]+")


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a caller wants.

    Attributes:
        size: bytes of memory.
        source: the message brings a descriptor of the sealed object to open.
        writable: the caller is to write there itself; never with ``source``.
    """

    size: int
    source: bool
    writable: bool = False

    def encode(self) -> bytes:
        kind = _WRITABLE if self.writable else _SOURCE if self.source else _PLAIN
        return _MAGIC + bytes([kind]) + self.size.to_bytes(8, "big")

    @classmethod
    def parse(cls, data: bytes) -> LeaseRequest:
        """Raises ``HostileInput``: ``BAD_LEASE_MESSAGE``, ``TRUNCATED``, ``TRAILING_BYTES``."""
        reader = _begun(data)
        kind = reader.u8("kind")
        if kind > _WRITABLE:
            raise _bad()
        request = cls(reader.u64("size"), kind == _SOURCE, kind == _WRITABLE)
        reader.end()
        return request


def encode_grant(lease: bytes) -> bytes:
    """The answer that comes with the memory."""
    return _MAGIC + bytes([_GRANT]) + lease


def encode_refusal(error: AgentError) -> bytes:
    """The answer of whoever gets none."""
    kind = next((number for number, each in enumerate(_KINDS) if isinstance(error, each)), len(_KINDS) - 1)
    milliseconds = 0 if error.retry_after is None else max(1, int(error.retry_after * 1000))
    message = error.message.encode("ascii", "replace")[:_MAX_TEXT]
    head = _MAGIC + bytes([_REFUSAL, kind]) + milliseconds.to_bytes(4, "big")
    return head + b"".join(len(part).to_bytes(2, "big") + part for part in (error.slug.encode("ascii"), message))


def parse_answer(data: bytes) -> bytes | AgentError:
    """The lease's id, or why there is none. Raises ``HostileInput`` as ``LeaseRequest.parse``, ``TOO_LARGE``."""
    reader = _begun(data)
    granted = reader.u8("verdict")
    if granted == _GRANT:
        lease = reader.take(ID_SIZE, "id")
        reader.end()
        return lease
    kind = reader.u8("kind")
    milliseconds = reader.u32("retry")
    slug, message = reader.sized16("slug", _MAX_SLUG), reader.sized16("message", _MAX_TEXT)
    reader.end()
    if granted != _REFUSAL or kind >= len(_KINDS) or not _SLUG.fullmatch(slug) or not _TEXT.fullmatch(message):
        raise _bad()
    retry = milliseconds / 1000 if milliseconds else None
    return _KINDS[kind](slug.decode("ascii"), message.decode("ascii"), retry_after=retry)


def _begun(data: bytes) -> Reader:
    reader = Reader(data, "lease message")
    if reader.take(len(_MAGIC), "magic") != _MAGIC:
        raise _bad()
    return reader


def _bad() -> HostileInput:
    return HostileInput("BAD_LEASE_MESSAGE", "lease message: not of this protocol")
