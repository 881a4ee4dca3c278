"""The outermost layer of DER and PEM, read strictly: libraries disagree on padding and on text around a block."""

from __future__ import annotations

import base64
import binascii
import re

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.reader import Reader

MAX_DER = 16 * 1024
"""Bytes of one certificate or key; the largest seen in evidence has under 2 KiB, an NV index at most 4 KiB."""

MAX_PEM_BLOCKS = 16

_PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----\s([A-Za-z0-9+/=\s]+)-----END \1-----\s*")


def trim_der(data: bytes) -> bytes:
    """Cut the zeros that pad an NV index off a DER value (ITU-T X.690, 8.1.3 and 10.1).

    Args:
        data: one DER SEQUENCE, then nothing or zero bytes only.

    Raises:
        HostileInput: ``BAD_DER`` for another tag or a length that is not the shortest form, ``TRUNCATED``,
            ``TOO_LARGE``, ``TRAILING_BYTES`` when what follows is not all zeros.
    """
    reader = Reader(data, "DER")
    tag = reader.u8("tag")
    if tag != 0x30:
        raise reader.fail("BAD_DER", f"tag 0x{tag:02x} is not a SEQUENCE")
    length = reader.u8("length")
    if length >= 0x80:
        width = length & 0x7F
        if not 1 <= width <= 3:
            raise reader.fail("BAD_DER", "the length is indefinite or absurd")
        length = reader.uint(width, "length")
        if length < 0x80 or length >> (8 * (width - 1)) == 0:
            raise reader.fail("BAD_DER", "the length is not in its shortest form")
    end = reader.offset + length
    if end > MAX_DER:
        raise reader.fail("TOO_LARGE", f"{end} bytes, at most {MAX_DER} are allowed")
    reader.take(length, "content")
    if reader.rest().strip(b"\0"):
        raise reader.fail("TRAILING_BYTES", "bytes other than zeros after its end")
    return data[:end]


def is_pem(data: bytes) -> bool:
    """Whether the data claims to be PEM."""
    return data.lstrip()[:11] == b"-----BEGIN "


def pem_blocks(data: bytes) -> list[tuple[str, bytes]]:
    """Split PEM (RFC 7468) into (label, content) pairs. Only white space may stand around the blocks.

    Raises ``HostileInput``: ``BAD_PEM``, or ``TOO_LARGE`` for too many bytes or blocks.
    """
    if len(data) > 2 * MAX_DER * MAX_PEM_BLOCKS:
        raise HostileInput("TOO_LARGE", "PEM: too many bytes")
    blocks: list[tuple[str, bytes]] = []
    rest = data.lstrip()
    position = 0
    while position < len(rest):
        match = _PEM_BLOCK.match(rest, position)
        if match is None:
            raise HostileInput("BAD_PEM", "PEM: not a sequence of well-formed blocks")
        if len(blocks) == MAX_PEM_BLOCKS:
            raise HostileInput("TOO_LARGE", f"PEM: more than {MAX_PEM_BLOCKS} blocks")
        try:
            content = base64.b64decode(b"".join(match[2].split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise HostileInput("BAD_PEM", "PEM: a block is not base64") from error
        blocks.append((match[1].decode("ascii"), content))
        position = match.end()
    if not blocks:
        raise HostileInput("BAD_PEM", "PEM: no block")
    return blocks


def certificates_of_pem(data: bytes) -> tuple[bytes, ...]:
    """DER of each block, all of which must be certificates.

    Raises ``HostileInput``: ``BAD_CERTIFICATE``, and as ``pem_blocks`` and ``trim_der``.
    """
    blocks = pem_blocks(data)
    if any(label != "CERTIFICATE" for label, _ in blocks):
        raise HostileInput("BAD_CERTIFICATE", "PEM: a block that is no certificate")
    return tuple(trim_der(content) for _, content in blocks)
