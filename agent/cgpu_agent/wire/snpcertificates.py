"""The certificates that a host hands to an SNP guest beside its report.

Source: AMD "SEV-ES Guest-Hypervisor Communication Block Standardization" (56421), 4.1.8.1: entries of GUID, offset
and length (u32, little-endian) up to an entry of zeros, then the certificates (DER).
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.der import trim_der
from cgpu_agent.wire.reader import Reader

MAX_ENTRIES: Final = 16
_ENTRY: Final = 24
_NAMES: Final = (
    UUID("63da758d-e664-4564-adc5-f4b93be8accd"),  # VCEK
    UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"),  # VLEK
    UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"),  # ASK
    UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"),  # ARK
)
_CERTIFICATES: Final = frozenset(form for name in _NAMES for form in (name.bytes, name.bytes_le))
"""In both byte orders: hosts differ."""


def parse_certificate_table(data: bytes) -> tuple[bytes, ...]:
    """DER of each certificate; other entries (revocation lists) are passed over. No bytes at all: none.

    Raises ``HostileInput``: ``TRUNCATED``, ``TOO_LARGE``, ``BAD_VALUE`` (an entry that lies outside of
    what follows the entries), and what ``trim_der`` raises.
    """
    if not data.strip(b"\0"):
        return ()
    reader = Reader(data, "certificate table", "little")
    entries: list[tuple[bytes, int, int]] = []
    while any(name := reader.take(16, "GUID")):
        if len(entries) == MAX_ENTRIES:
            raise reader.fail("TOO_LARGE", f"more than {MAX_ENTRIES} entries")
        entries.append((name, reader.u32("offset"), reader.u32("length")))
    if reader.u32("offset") or reader.u32("length"):
        raise reader.fail("BAD_VALUE", "its end is no entry of zeros")
    for _, offset, length in entries:
        if offset < reader.offset or offset + length > len(data):
            raise reader.fail("BAD_VALUE", "an entry lies outside of it")
    return tuple(
        _certificate(data[offset : offset + length]) for name, offset, length in entries if name in _CERTIFICATES
    )


def _certificate(data: bytes) -> bytes:
    der = trim_der(data)
    if len(der) != len(data):
        raise HostileInput("TRAILING_BYTES", "certificate table: bytes after a certificate")
    return der
