"""A device's attestation report: SPDM 1.1 GET_MEASUREMENTS request and MEASUREMENTS response, end to end.

The device signs request and response up to the signature, without the prefix that SPDM 1.2 puts before them. The
signature is where the lengths say, never "the last bytes". Sources: DMTF DSP0274 1.1.1, 10.11; its integers are
little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.reader import Reader

NONCE_SIZE: Final = 32
SIGNATURE_SIZE: Final = 96
"""ECDSA on P-384: r || s, 48 bytes each, big-endian."""
MAX_REPORT: Final = 8192
"""Bytes of the buffer in which the driver hands a report over."""

_REQUEST: Final = bytes((0x11, 0xE0, 0x01, 0xFF))  # SPDM 1.1, GET_MEASUREMENTS, signed, all measurements
_RESPONSE: Final = bytes((0x11, 0x60, 0x00, 0x00))  # SPDM 1.1, MEASUREMENTS
_DMTF: Final = 0x01  # MeasurementSpecification
_MAX_SLOT: Final = 7
_BLOCK_HEADER: Final = 4  # Index, MeasurementSpecification, MeasurementSize
_VALUE_HEADER: Final = 3  # DMTFSpecMeasurementValueType, DMTFSpecMeasurementValueSize


@dataclass(frozen=True, slots=True)
class Measurement:
    """One DMTF measurement block.

    Attributes:
        index: 1-255, distinct within a report.
        value_type: DMTFSpecMeasurementValueType as sent (1 = mutable firmware).
        value: the digest.
    """

    index: int
    value_type: int
    value: bytes

    def encode(self) -> bytes:
        """The block's bytes."""
        size = len(self.value)
        header = bytes((self.index, _DMTF)) + (_VALUE_HEADER + size).to_bytes(2, "little")
        return header + bytes((self.value_type,)) + size.to_bytes(2, "little") + self.value


@dataclass(frozen=True, slots=True)
class Report:
    """A parsed report; nothing of it is verified.

    Attributes:
        nonce: 32 bytes of the request: the challenge that the report answers.
        slot: certificate slot that was asked for, 0-7.
        measurements: SPDM index -> block, in the order sent.
        responder_nonce: 32 bytes that the device chose; no freshness comes from them.
        opaque: OpaqueData of the response, see ``wire.nvidia``.
        signed: the bytes that the signature covers: all but the signature.
        signature: r || s, 96 bytes.
    """

    nonce: bytes
    slot: int
    measurements: Mapping[int, Measurement]
    responder_nonce: bytes
    opaque: bytes
    signed: bytes
    signature: bytes


def parse_report(data: bytes) -> Report:
    """Parse a report, every byte of it.

    Args:
        data: request and response, concatenated, at most ``MAX_REPORT`` bytes.

    Raises:
        HostileInput: ``TOO_LARGE``, ``TRUNCATED``, ``TRAILING_BYTES`` (bytes after the signature), ``BAD_REPORT``
            (not this request or response), ``BAD_MEASUREMENT``, ``DUPLICATE_MEASUREMENT``.
    """
    if len(data) > MAX_REPORT:
        raise HostileInput("TOO_LARGE", f"SPDM report: {len(data)} bytes, at most {MAX_REPORT} are allowed")
    reader = Reader(data, "SPDM report", endian="little")
    if reader.take(len(_REQUEST), "request header") != _REQUEST:
        raise reader.fail("BAD_REPORT", "does not begin with an SPDM 1.1 request for all measurements, signed")
    nonce = reader.take(NONCE_SIZE, "request nonce")
    slot = reader.u8("slot")
    if slot > _MAX_SLOT:
        raise reader.fail("BAD_REPORT", f"certificate slot {slot} does not exist")
    if reader.take(len(_RESPONSE), "response header") != _RESPONSE:
        raise reader.fail("BAD_REPORT", "the request is not followed by an SPDM 1.1 measurements response")
    count = reader.u8("number of blocks")
    record = reader.take(reader.uint(3, "record length"), "measurement record")
    responder_nonce = reader.take(NONCE_SIZE, "responder nonce")
    opaque = reader.sized16("opaque data")
    signed = data[: reader.offset]
    signature = reader.take(SIGNATURE_SIZE, "signature")
    reader.end()
    return Report(nonce, slot, _parse_record(record, count), responder_nonce, opaque, signed, signature)


def _parse_record(record: bytes, count: int) -> dict[int, Measurement]:
    reader = Reader(record, "measurement record", endian="little")
    found: dict[int, Measurement] = {}
    for _ in range(count):
        block = _parse_block(reader)
        if block.index in found:
            raise reader.fail("DUPLICATE_MEASUREMENT", f"index {block.index} occurs twice")
        found[block.index] = block
    reader.end()
    return found


def _parse_block(reader: Reader) -> Measurement:
    index = reader.u8("block index")
    if not 1 <= index <= 0xFE:  # 0 and 0xFF are questions (how many, all), no blocks
        raise reader.fail("BAD_MEASUREMENT", f"index {index} is not that of a block")
    if reader.u8("measurement specification") != _DMTF:
        raise reader.fail("BAD_MEASUREMENT", f"block {index} is not in DMTF format")
    size = reader.u16("measurement size")
    value_type = reader.u8("value type")
    value_size = reader.u16("value size")
    if size != _VALUE_HEADER + value_size:
        raise reader.fail("BAD_MEASUREMENT", f"block {index} has two sizes that do not fit")
    return Measurement(index, value_type, reader.take(value_size, "value"))


def encode_signed(
    nonce: bytes, measurements: Sequence[Measurement], responder_nonce: bytes, opaque: bytes, *, slot: int = 0
) -> bytes:
    """The bytes of a report that its device signs; with the 96 signature bytes after them it is complete.

    Args:
        nonce: 32 bytes of the requester.
        measurements: the blocks, at most 255.
        responder_nonce: 32 bytes of the device.
        opaque: OpaqueData, at most 65535 bytes.
        slot: certificate slot.
    """
    record = b"".join(each.encode() for each in measurements)
    request = _REQUEST + nonce + bytes((slot,))
    header = _RESPONSE + bytes((len(measurements),)) + len(record).to_bytes(3, "little")
    return request + header + record + responder_nonce + len(opaque).to_bytes(2, "little") + opaque
