"""A certificate as boot logs mention it: its subject for people, its SHA-256 for policies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography import x509

from cgpu_agent.wire.text import printable


@dataclass(frozen=True, slots=True)
class Certificate:
    """``subject`` is RFC 4514 text, ``None`` when the bytes are no certificate; ``sha256`` is hex over the bytes."""

    subject: str | None
    sha256: str


def read_certificate(der: bytes) -> Certificate:
    """Name a DER certificate. Never fails: what cannot be read has no subject. Nothing is verified."""
    fingerprint = hashlib.sha256(der).hexdigest()
    if der[:1] != b"\x30":
        return Certificate(None, fingerprint)
    try:
        # Old certificates make the library warn; where warnings are errors, that must not become a crash.
        subject = x509.load_der_x509_certificate(der).subject.rfc4514_string()
    except (ValueError, TypeError, x509.InvalidVersion, Warning):
        return Certificate(None, fingerprint)
    return Certificate(printable(subject, 512), fingerprint)
