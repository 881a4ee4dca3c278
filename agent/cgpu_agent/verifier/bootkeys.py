"""A certificate as boot logs mention it: its subject for people, its SHA-256 for policies."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

from cryptography import x509

from cgpu_agent.wire.text import printable

# Firmware vendors' certificates are old and odd: the library's complaints would land on a person's terminal.
warnings.filterwarnings("ignore", module=r"cgpu_agent\.verifier\.bootkeys")


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
        subject = x509.load_der_x509_certificate(der).subject.rfc4514_string()
    except (ValueError, TypeError, x509.InvalidVersion, Warning):
        return Certificate(None, fingerprint)
    return Certificate(printable(subject, 512), fingerprint)
