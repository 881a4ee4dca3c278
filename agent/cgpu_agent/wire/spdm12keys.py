"""The SPDM 1.2 key schedule, what signatures cover, and the frame of a secured message.

Sources: DMTF DSP0274 1.2.1, clauses 12 (key schedule) and 15 (signing); DSP0277 1.1, clause 7 (records); DSP0276 1.1
(records over MCTP: two bytes of sequence number). Hash functions only: encrypting is for whoever holds a session.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.spdm12 import HASH_SIZE, MAX_MESSAGE

KEY_SIZE: Final = 32
IV_SIZE: Final = 12
TAG_SIZE: Final = 16
MEASUREMENTS_CONTEXT: Final = b"responder-measurements signing"
KEY_EXCHANGE_CONTEXT: Final = b"responder-key_exchange_rsp signing"

_CONTEXT_SIZE: Final = 36
_SEQUENCE_SIZE: Final = 2  # of a record: the low bytes of a counter of eight
_COUNTER_SIZE: Final = 8
_LAST_SEQUENCE: Final = (1 << 32) - 1  # far below what AES-GCM allows one key
_ZERO: Final = bytes(HASH_SIZE)


def to_be_signed(context: bytes, transcript: bytes) -> bytes:
    """The message that an SPDM 1.2 signature covers, of a transcript's SHA-384 digest (15.1)."""
    return b"dmtf-spdm-v1.2.*" * 4 + context.rjust(_CONTEXT_SIZE, b"\0") + transcript


def bin_concat(length: int, label: bytes, context: bytes = b"") -> bytes:
    """The info of an HKDF-Expand (12.3)."""
    return length.to_bytes(2, "little") + b"spdm1.2 " + label + context


def expand(secret: bytes, length: int, label: bytes, context: bytes = b"") -> bytes:
    """HKDF-Expand with SHA-384 (RFC 5869, 2.3) over ``bin_concat``; at most 48 bytes, so one block does."""
    return hmac.digest(secret, bin_concat(length, label, context) + b"\1", "sha384")[:length]


def verify_data(finished: bytes, transcript: bytes) -> bytes:
    """HMAC of a transcript's digest, which proves the key that ``finished`` comes from (10.16, 10.17)."""
    return hmac.digest(finished, transcript, "sha384")


@dataclass(frozen=True, slots=True)
class DirectionKeys:
    """What one direction of one phase encrypts with; ``finished`` authenticates a handshake, ``secret`` makes all."""

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)
    finished: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> DirectionKeys:
        return cls(
            expand(secret, KEY_SIZE, b"key"),
            expand(secret, IV_SIZE, b"iv"),
            expand(secret, HASH_SIZE, b"finished"),
            secret,
        )

    def update(self) -> DirectionKeys:
        """The keys after these: what the specification calls an update of a major secret."""
        return self.of(expand(self.secret, HASH_SIZE, b"traffic upd"))

    def nonce(self, sequence: int) -> bytes:
        """The IV, with the sequence number XORed into its first bytes (DSP0277 1.1, 7.3)."""
        mask = sequence.to_bytes(_COUNTER_SIZE, "little").ljust(IV_SIZE, b"\0")
        return bytes(a ^ b for a, b in zip(self.iv, mask, strict=True))


@dataclass(frozen=True, slots=True)
class Secrets:
    """The keys of a phase: what the requester sends with, what the responder sends with.

    ``exporter`` is the Export Master Secret of the application phase, from which users of a session derive their own
    keys; empty in the handshake.
    """

    requester: DirectionKeys
    responder: DirectionKeys
    exporter: bytes = field(default=b"", repr=False)


def handshake_secret(shared: bytes) -> bytes:
    """HKDF-Extract of the Diffie-Hellman secret: the x coordinate, 48 bytes."""
    return hmac.digest(_ZERO, shared, "sha384")


def handshake_keys(secret: bytes, th1: bytes) -> Secrets:
    """Keys of the handshake phase, from the handshake secret and the digest TH1."""
    return Secrets(
        DirectionKeys.of(expand(secret, HASH_SIZE, b"req hs data", th1)),
        DirectionKeys.of(expand(secret, HASH_SIZE, b"rsp hs data", th1)),
    )


def application_keys(secret: bytes, th2: bytes) -> Secrets:
    """Keys of the application phase, from the handshake secret and the digest TH2."""
    master = hmac.digest(expand(secret, HASH_SIZE, b"derived"), _ZERO, "sha384")
    return Secrets(
        DirectionKeys.of(expand(master, HASH_SIZE, b"req app data", th2)),
        DirectionKeys.of(expand(master, HASH_SIZE, b"rsp app data", th2)),
        expand(master, HASH_SIZE, b"exp master", th2),
    )


class Transcript:
    """The running digest of an SPDM conversation; costs the same memory however long it gets."""

    __slots__ = ("_hash",)

    def __init__(self, start: bytes = b"") -> None:
        self._hash = hashlib.sha384(start)

    def add(self, *messages: bytes) -> None:
        for each in messages:
            self._hash.update(each)

    def digest(self) -> bytes:
        """The digest so far; the transcript goes on."""
        return self._hash.digest()

    def copy(self) -> Transcript:
        """A transcript that begins with what this one holds."""
        other = Transcript()
        other._hash = self._hash.copy()
        return other


def record_header(session: int, sequence: int, sealed_size: int) -> bytes:
    """The clear head of a record, which is also its associated data: session id, sequence number, length.

    Raises ``HostileInput`` (``SEQUENCE_EXHAUSTED``): a key must not be used further.
    """
    if sequence > _LAST_SEQUENCE:
        raise HostileInput("SEQUENCE_EXHAUSTED", "SPDM session: too many messages under one key")
    numbers = session.to_bytes(4, "little") + sequence.to_bytes(_COUNTER_SIZE, "little")[:_SEQUENCE_SIZE]
    return numbers + sealed_size.to_bytes(2, "little")


def parse_record(data: bytes, session: int, sequence: int) -> bytes:
    """The sealed part of a record that must be this one of this session.

    Raises ``HostileInput``: ``WRONG_SESSION``, ``WRONG_SEQUENCE`` (replayed, reordered or dropped), lengths.
    """
    reader = Reader(data, "SPDM record", endian="little")
    if reader.u32("session id") != session:
        raise reader.fail("WRONG_SESSION", "it is of another session")
    if reader.u16("sequence number") != sequence & 0xFFFF:
        raise reader.fail("WRONG_SEQUENCE", "it is not the next of its session")
    sealed = reader.sized16("sealed data")
    reader.end()
    if len(sealed) < 2 + TAG_SIZE:
        raise reader.fail("TRUNCATED", "too short for a length and a tag")
    return sealed


def encode_plain(message: bytes) -> bytes:
    """What a record seals: length, message, no padding."""
    if len(message) > min(MAX_MESSAGE, 0xFFFF - 2 - TAG_SIZE):
        raise HostileInput("TOO_LARGE", "SPDM record: the message does not fit")
    return len(message).to_bytes(2, "little") + message


def parse_plain(plain: bytes) -> bytes:
    """The message in an opened record; random padding after it is skipped. Raises ``HostileInput``."""
    return Reader(plain, "SPDM record", endian="little").sized16("message")
