"""The firmware identifier (FWID) that a device's leaf certificate certifies: a digest of the firmware it runs.

DICE has two extensions for it, and NVIDIA uses one on Hopper and LS10, the other on Blackwell. Sources: Microsoft's
RIoT CompositeDeviceID (2.23.133.5.4.1 as devices use it); TCG "DICE Attestation Architecture" 1.1, 6.1 (DiceTcbInfo).
"""

from __future__ import annotations

from typing import Final

from cryptography import x509

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.nvidia import FWID_SIZE
from cgpu_agent.wire.reader import Reader

COMPOSITE_DEVICE_ID: Final = x509.ObjectIdentifier("2.23.133.5.4.1")
TCB_INFO: Final = x509.ObjectIdentifier("2.23.133.5.4.1.1")

_SEQUENCE, _INTEGER, _OCTET_STRING, _OID = 0x30, 0x02, 0x04, 0x06
_TCB_FWIDS = 0xA6  # [6], constructed
_TCB_LAST = 9
_SHA384 = bytes.fromhex("608648016503040202")


def certified_fwid(leaf: x509.Certificate) -> bytes | None:
    """The FWID in a leaf certificate, 48 bytes; ``None`` where it has neither extension.

    Raises:
        HostileInput: ``BAD_FWID`` (both extensions, or one of another shape).
    """
    found = [each for each in leaf.extensions if each.oid in (COMPOSITE_DEVICE_ID, TCB_INFO)]
    if not found:
        return None
    if len(found) > 1 or not isinstance(found[0].value, x509.UnrecognizedExtension):
        raise HostileInput("BAD_FWID", "the leaf certificate does not hold its FWID in one known extension")
    read = _composite_device_id if found[0].oid == COMPOSITE_DEVICE_ID else _tcb_info
    try:
        return read(found[0].value.value)
    except HostileInput as error:
        raise HostileInput("BAD_FWID", "the FWID extension of the leaf certificate is malformed") from error


def _element(reader: Reader) -> tuple[int, Reader]:
    """The next DER element: its tag, and a reader of its content."""
    tag = reader.u8("tag")
    length = reader.u8("length")
    if length >= 0x80:
        if length != 0x81:
            raise reader.fail("BAD_DER", "longer than any FWID extension")
        length = reader.u8("length")
        if length < 0x80:
            raise reader.fail("BAD_DER", "a length that is not in its shortest form")
    return tag, Reader(reader.take(length, "content"), "DER element")


def _expect(reader: Reader, tag: int) -> Reader:
    found, content = _element(reader)
    if found != tag:
        raise reader.fail("BAD_DER", f"tag 0x{found:02x} where 0x{tag:02x} is expected")
    return content


def _whole(data: bytes) -> Reader:
    outer = Reader(data, "FWID extension")
    content = _expect(outer, _SEQUENCE)
    outer.end()
    return content


def _fwid(reader: Reader) -> bytes:
    """SEQUENCE { OID sha384, OCTET STRING of 48 bytes }."""
    pair = _expect(reader, _SEQUENCE)
    algorithm, digest = _expect(pair, _OID).rest(), _expect(pair, _OCTET_STRING).rest()
    pair.end()
    if algorithm != _SHA384 or len(digest) != FWID_SIZE:
        raise reader.fail("BAD_DER", "a FWID that is not a SHA-384 digest")
    return digest


def _composite_device_id(data: bytes) -> bytes:
    """SEQUENCE { INTEGER 1, SubjectPublicKeyInfo, FWID }."""
    content = _whole(data)
    if _expect(content, _INTEGER).rest() != b"\1":
        raise content.fail("BAD_DER", "another version than 1")
    _expect(content, _SEQUENCE)
    digest = _fwid(content)
    content.end()
    return digest


def _tcb_info(data: bytes) -> bytes:
    """SEQUENCE of tagged fields in rising order; [6] lists FWIDs, of which the first is the firmware's."""
    content = _whole(data)
    digest: bytes | None = None
    last = -1
    while content.remaining:
        tag, value = _element(content)
        number = tag & 0x1F
        if tag & 0xC0 != 0x80 or not last < number <= _TCB_LAST:
            raise content.fail("BAD_DER", "fields that are not those of DiceTcbInfo, in order")
        last = number
        if tag == _TCB_FWIDS:
            digest = _fwid(value)
            while value.remaining:
                _fwid(value)
    if digest is None:
        raise content.fail("BAD_DER", "no FWID")
    return digest
