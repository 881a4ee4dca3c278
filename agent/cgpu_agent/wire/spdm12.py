"""SPDM 1.2 messages of the one profile spoken here: P-384, SHA-384, AES-256-GCM, certificates, no mutual auth.

Whatever another profile would allow (other algorithms, versions, slots, PSK, chunks) is refused instead of
negotiated, so nobody in the middle can choose. Source: DMTF DSP0274 1.2.1, clause 10; its integers are little-endian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.spdm import Measurement

VERSION: Final = 0x12
MAX_MESSAGE: Final = 0x14000
"""MaxSPDMmsgSize and DataTransferSize of both sides: nothing is ever sent in chunks."""
HASH_SIZE: Final = 48
NONCE_SIZE: Final = 32
SIGNATURE_SIZE: Final = 96
EXCHANGE_SIZE: Final = 96
"""A P-384 point as x || y, big-endian."""
ALL_BLOCKS: Final = 0xFF
SLOT: Final = 0
"""The only certificate slot."""

_FIRST_VERSION: Final = 0x10  # GET_VERSION and VERSION are always of version 1.0
_VERSION_1_2: Final = 0x1200
# CERT, ENCRYPT, MAC, KEY_EX, KEY_UPD; the responder also signs measurements (MEAS_CAP 2, fresh).
_REQUESTER_FLAGS: Final = 1 << 1 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 14
_RESPONDER_FLAGS: Final = _REQUESTER_FLAGS | 2 << 3 | 1 << 5
_CT_EXPONENT: Final = 20
_DMTF: Final = 1  # MeasurementSpecification
_OPAQUE_FORMAT_1: Final = 2
_ECDSA_P384, _SHA_384, _MEASURED_BY_SHA_384 = 0x80, 0x02, 0x04
# AlgType, AlgCount (two fixed bytes), AlgSupported: DHE secp384r1, AEAD AES-256-GCM, the SPDM key schedule.
_TABLES: Final = bytes.fromhex("02201000 03200200 05200100")
_TABLE_COUNT: Final = 3


class Code(IntEnum):
    """RequestResponseCode. A response's is its request's without the top bit."""

    DIGESTS = 0x01
    CERTIFICATE = 0x02
    VERSION = 0x04
    MEASUREMENTS = 0x60
    CAPABILITIES = 0x61
    ALGORITHMS = 0x63
    KEY_EXCHANGE_RSP = 0x64
    FINISH_RSP = 0x65
    KEY_UPDATE_ACK = 0x69
    END_SESSION_ACK = 0x6C
    VENDOR_DEFINED_RESPONSE = 0x7E
    ERROR = 0x7F
    GET_DIGESTS = 0x81
    GET_CERTIFICATE = 0x82
    GET_VERSION = 0x84
    GET_MEASUREMENTS = 0xE0
    GET_CAPABILITIES = 0xE1
    NEGOTIATE_ALGORITHMS = 0xE3
    KEY_EXCHANGE = 0xE4
    FINISH = 0xE5
    KEY_UPDATE = 0xE9
    END_SESSION = 0xEC
    VENDOR_DEFINED_REQUEST = 0xFE


class ErrorCode(IntEnum):
    """Param1 of ERROR."""

    INVALID_REQUEST = 0x01
    UNEXPECTED_REQUEST = 0x04
    UNSPECIFIED = 0x05
    DECRYPT_ERROR = 0x06
    UNSUPPORTED_REQUEST = 0x07
    SESSION_LIMIT_EXCEEDED = 0x0A
    VERSION_MISMATCH = 0x41


def code_of(message: bytes) -> int:
    """RequestResponseCode of a message. Raises ``HostileInput``: ``TRUNCATED``, ``TOO_LARGE``."""
    if len(message) > MAX_MESSAGE:
        raise HostileInput("TOO_LARGE", f"SPDM message: {len(message)} bytes, at most {MAX_MESSAGE} are allowed")
    reader = Reader(message, "SPDM message", endian="little")
    return reader.take(4, "header")[1]


def header(code: Code, first: int = 0, second: int = 0, version: int = VERSION) -> bytes:
    """The four bytes that every message begins with."""
    return bytes((version, code, first, second))


class Message:
    """A message whose header is right; what follows is read field by field, to its end."""

    def __init__(self, data: bytes, code: Code, version: int = VERSION) -> None:
        found = code_of(data)
        self.reader = Reader(data, f"SPDM {code.name}", endian="little")
        self._version = self.reader.u8("version")
        self.reader.u8("code")
        self.first = self.reader.u8("Param1")
        self.second = self.reader.u8("Param2")
        if found == Code.ERROR and code < Code.ERROR:
            raise self.reader.fail("SPDM_ERROR", f"the other side answered with error 0x{self.first:02x}")
        if found != code:
            raise self.reader.fail("BAD_SPDM", f"the message has code 0x{found:02x}")
        if self._version != version:
            raise self.reader.fail("SPDM_VERSION", f"the message is of version 0x{self._version:02x}")

    def fixed(self, expected: bytes, what: str) -> None:
        """Bytes that the profile leaves no choice about."""
        if self.reader.take(len(expected), what) != expected:
            raise self.reader.fail("SPDM_PROFILE", f"{what} is not that of the profile spoken here")

    def parameters(self, first: int = 0, second: int = 0) -> None:
        if (self.first, self.second) != (first, second):
            raise self.reader.fail("BAD_SPDM", f"parameters 0x{self.first:02x} 0x{self.second:02x}")


# --- VCA: version, capabilities, algorithms ---

GET_VERSION: Final = header(Code.GET_VERSION, version=_FIRST_VERSION)
VERSION_RESPONSE: Final = header(Code.VERSION, version=_FIRST_VERSION) + b"\0\1" + _VERSION_1_2.to_bytes(2, "little")


def _capabilities(code: Code, exponent: int, flags: int) -> bytes:
    sizes = MAX_MESSAGE.to_bytes(4, "little") * 2
    return header(code) + bytes((0, exponent, 0, 0)) + flags.to_bytes(4, "little") + sizes


GET_CAPABILITIES: Final = _capabilities(Code.GET_CAPABILITIES, 0, _REQUESTER_FLAGS)
CAPABILITIES: Final = _capabilities(Code.CAPABILITIES, _CT_EXPONENT, _RESPONDER_FLAGS)


def _algorithms(code: Code, selected: bytes) -> bytes:
    body = bytes((_DMTF, _OPAQUE_FORMAT_1)) + selected + _ECDSA_P384.to_bytes(4, "little")
    body += _SHA_384.to_bytes(4, "little") + bytes(12) + bytes(4) + _TABLES
    size = 4 + 2 + len(body)
    return header(code, _TABLE_COUNT) + size.to_bytes(2, "little") + body


NEGOTIATE_ALGORITHMS: Final = _algorithms(Code.NEGOTIATE_ALGORITHMS, b"")
ALGORITHMS: Final = _algorithms(Code.ALGORITHMS, _MEASURED_BY_SHA_384.to_bytes(4, "little"))


def require_version(data: bytes) -> None:
    """Read VERSION: 1.2 must be among at most 32 entries. Raises ``HostileInput``: ``SPDM_VERSION``, ``BAD_SPDM``."""
    message = Message(data, Code.VERSION, _FIRST_VERSION)
    message.parameters()
    message.fixed(b"\0", "reserved byte")
    count = message.reader.u8("entry count")
    if not 1 <= count <= 32:
        raise message.reader.fail("BAD_SPDM", f"{count} versions")
    entries = {message.reader.u16("version entry") >> 8 for _ in range(count)}
    message.reader.end()
    if VERSION not in entries:
        raise message.reader.fail("SPDM_VERSION", "version 1.2 is not spoken")


def require_exactly(data: bytes, expected: bytes) -> None:
    """A message that the profile fixes to the last byte, e.g. ``ALGORITHMS``.

    Raises ``HostileInput``: ``SPDM_ERROR`` (the other side refused), ``SPDM_PROFILE``, ``SPDM_VERSION``,
    ``BAD_SPDM``, ``TRUNCATED``, ``TRAILING_BYTES``.
    """
    message = Message(data, Code(expected[1]), expected[0])
    message.parameters(expected[2], expected[3])
    message.fixed(expected[4:], "content")
    message.reader.end()


# --- certificates ---


@dataclass(frozen=True, slots=True)
class GetCertificate:
    """GET_CERTIFICATE of slot 0: ``length`` bytes from ``offset`` of the chain (10.7)."""

    offset: int
    length: int

    def encode(self) -> bytes:
        numbers = self.offset.to_bytes(2, "little") + self.length.to_bytes(2, "little")
        return header(Code.GET_CERTIFICATE, SLOT) + numbers

    @classmethod
    def parse(cls, data: bytes) -> GetCertificate:
        message = Message(data, Code.GET_CERTIFICATE)
        message.parameters(SLOT)
        found = cls(message.reader.u16("offset"), message.reader.u16("length"))
        message.reader.end()
        return found


@dataclass(frozen=True, slots=True)
class CertificatePortion:
    """CERTIFICATE: a piece of the chain, and how many bytes follow it."""

    portion: bytes
    remainder: int

    def encode(self) -> bytes:
        sizes = len(self.portion).to_bytes(2, "little") + self.remainder.to_bytes(2, "little")
        return header(Code.CERTIFICATE, SLOT) + sizes + self.portion

    @classmethod
    def parse(cls, data: bytes) -> CertificatePortion:
        message = Message(data, Code.CERTIFICATE)
        message.parameters(SLOT)
        size, remainder = message.reader.u16("portion length"), message.reader.u16("remainder length")
        portion = message.reader.take(size, "portion")
        message.reader.end()
        return cls(portion, remainder)


GET_DIGESTS: Final = header(Code.GET_DIGESTS)


def encode_digests(chain: bytes) -> bytes:
    """DIGESTS for one slot that holds this chain (10.6)."""
    return header(Code.DIGESTS, 0, 1 << SLOT) + hashlib.sha384(chain).digest()


def parse_digests(data: bytes) -> bytes:
    """The digest of slot 0's chain, the only one there. Raises ``HostileInput``."""
    message = Message(data, Code.DIGESTS)
    message.parameters(0, 1 << SLOT)
    digest = message.reader.take(HASH_SIZE, "digest")
    message.reader.end()
    return digest


def encode_chain(certificates: Sequence[bytes]) -> bytes:
    """A chain as slots hold it: length, digest of the root, then DER certificates, root first (10.6.1).

    Args:
        certificates: DER, root first; together below 64 KiB.
    """
    body = hashlib.sha384(certificates[0]).digest() + b"".join(certificates)
    return (4 + len(body)).to_bytes(2, "little") + b"\0\0" + body


def parse_chain(data: bytes) -> tuple[bytes, ...]:
    """The DER certificates of a chain, root first, 1 to 8. Raises ``HostileInput``: ``BAD_CHAIN`` and lengths."""
    reader = Reader(data, "SPDM certificate chain", endian="little")
    size, reserved = reader.u16("length"), reader.u16("reserved")
    root = reader.take(HASH_SIZE, "root digest")
    if size != len(data) or reserved:
        raise reader.fail("BAD_CHAIN", "its length is not that of the bytes")
    found: list[bytes] = []
    while reader.remaining and len(found) < 8:
        head = reader.take(4, "certificate header")
        if head[:2] != b"\x30\x82":  # a certificate is a SEQUENCE of 256-65535 bytes
            raise reader.fail("BAD_CHAIN", "something that is not a certificate")
        found.append(head + reader.take(int.from_bytes(head[2:], "big"), "certificate"))
    reader.end()
    if not found or hashlib.sha384(found[0]).digest() != root:
        raise reader.fail("BAD_CHAIN", "it does not begin with the root that it names")
    return tuple(found)


# --- measurements ---


@dataclass(frozen=True, slots=True)
class GetMeasurements:
    """GET_MEASUREMENTS (10.11).

    Attributes:
        operation: 0 = how many there are, 1-254 = one block, ``ALL_BLOCKS``.
        nonce: 32 bytes, which ask for a signature; ``None`` = unsigned.
    """

    operation: int
    nonce: bytes | None

    def encode(self) -> bytes:
        if self.nonce is None:
            return header(Code.GET_MEASUREMENTS, 0, self.operation)
        return header(Code.GET_MEASUREMENTS, 1, self.operation) + self.nonce + bytes((SLOT,))

    @classmethod
    def parse(cls, data: bytes) -> GetMeasurements:
        message = Message(data, Code.GET_MEASUREMENTS)
        message.parameters(message.first & 1, message.second)
        nonce = None
        if message.first:
            nonce = message.reader.take(NONCE_SIZE, "nonce")
            message.fixed(bytes((SLOT,)), "slot")
        message.reader.end()
        return cls(message.second, nonce)


@dataclass(frozen=True, slots=True)
class Measurements:
    """MEASUREMENTS.

    Attributes:
        total: how many blocks there are, where that was asked for, else 0.
        blocks: distinct indices.
        nonce: 32 bytes of the responder.
        signature: r || s, or ``None`` where none was asked for.
    """

    total: int
    blocks: tuple[Measurement, ...]
    nonce: bytes
    signature: bytes | None

    def encode(self) -> bytes:
        record = b"".join(block.encode() for block in self.blocks)
        sizes = bytes((len(self.blocks),)) + len(record).to_bytes(3, "little")
        body = sizes + record + self.nonce + b"\0\0"
        return header(Code.MEASUREMENTS, self.total, SLOT) + body + (self.signature or b"")

    @classmethod
    def parse(cls, data: bytes, *, signed: bool) -> Measurements:
        message = Message(data, Code.MEASUREMENTS)
        message.parameters(message.first, SLOT)
        reader = message.reader
        count = reader.u8("number of blocks")
        record = Reader(reader.take(reader.uint(3, "record length"), "record"), "SPDM record", endian="little")
        blocks = tuple(_block(record) for _ in range(count))
        record.end()
        if len({block.index for block in blocks}) != count:
            raise reader.fail("DUPLICATE_MEASUREMENT", "an index occurs twice")
        nonce = reader.take(NONCE_SIZE, "nonce")
        message.fixed(b"\0\0", "opaque length")
        signature = reader.take(SIGNATURE_SIZE, "signature") if signed else None
        reader.end()
        return cls(message.first, blocks, nonce, signature)


def _block(reader: Reader) -> Measurement:
    index, specification = reader.u8("index"), reader.u8("specification")
    size, kind, value_size = reader.u16("size"), reader.u8("value type"), reader.u16("value size")
    if index in (0, 0xFF) or specification != _DMTF or size != 3 + value_size:
        raise reader.fail("BAD_MEASUREMENT", f"block {index} is malformed")
    return Measurement(index, kind, reader.take(value_size, "value"))


# --- errors and vendor-defined messages ---


def encode_error(code: ErrorCode) -> bytes:
    """ERROR (10.13), which says no more than its code."""
    return header(Code.ERROR, code)


def parse_error(data: bytes) -> int:
    """The code of an ERROR. Raises ``HostileInput``."""
    message = Message(data, Code.ERROR)
    message.reader.end()
    return message.first


_VENDOR: Final = b"\x04\0\x04" + (32473).to_bytes(4, "little")  # IANA's enterprise number for examples (RFC 5612)


def encode_vendor(payload: bytes, *, response: bool) -> bytes:
    """VENDOR_DEFINED_REQUEST or _RESPONSE (10.14) with at most 65535 bytes of payload."""
    code = Code.VENDOR_DEFINED_RESPONSE if response else Code.VENDOR_DEFINED_REQUEST
    return header(code) + _VENDOR + len(payload).to_bytes(2, "little") + payload


def parse_vendor(data: bytes, *, response: bool) -> bytes:
    """The payload of such a message. Raises ``HostileInput``."""
    message = Message(data, Code.VENDOR_DEFINED_RESPONSE if response else Code.VENDOR_DEFINED_REQUEST)
    message.parameters()
    message.fixed(_VENDOR, "vendor")
    payload = message.reader.sized16("payload")
    message.reader.end()
    return payload
