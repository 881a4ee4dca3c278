"""DER lengths, just enough to cut a certificate out of a zero-padded NV index (ITU-T X.690, 8.1.3)."""

from __future__ import annotations

from cgpu_agent.wire.reader import Reader


def trim(data: bytes) -> bytes:
    """The DER SEQUENCE at the start of ``data``; what follows must be zeros.

    Raises:
        HostileInput: ``BAD_DER`` when it is no SEQUENCE of minimal length, ``TRUNCATED``, ``TRAILING_BYTES``.
    """
    reader = Reader(data, "certificate")
    if reader.u8("tag") != 0x30:
        raise reader.fail("BAD_DER", "does not begin with a SEQUENCE")
    first = reader.u8("length")
    if first < 0x80:
        length = first
    else:
        size = first & 0x7F
        if not 1 <= size <= 3:
            raise reader.fail("BAD_DER", "indefinite or excessive length")
        length = reader.uint(size, "length")
        if length < 0x80 or length >> (8 * (size - 1)) == 0:
            raise reader.fail("BAD_DER", "length is not minimal")
    header = reader.offset
    reader.take(length, "content")
    if reader.rest().strip(b"\0"):
        raise reader.fail("TRAILING_BYTES", "bytes other than zero padding after its end")
    return data[: header + length]
