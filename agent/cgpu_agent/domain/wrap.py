"""Wraps a released key to a public key of the caller's, so that it passes in the clear nowhere.

HPKE (RFC 9180), base mode: DHKEM(X25519 or P-256, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from cgpu_agent.errors import Misuse
from cgpu_agent.wire.delivery import hpke_info

MAX_RECIPIENT: Final = 512

_X25519: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_P256: Final = Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)

Recipient = X25519PublicKey | EllipticCurvePublicKey


def load_recipient(spki: bytes) -> Recipient:
    """A caller's public key. Raises ``Misuse`` (``BAD_RECIPIENT``)."""
    bad = Misuse("BAD_RECIPIENT", "the recipient must be a DER SubjectPublicKeyInfo of an X25519 or P-256 key")
    if not 1 <= len(spki) <= MAX_RECIPIENT:
        raise bad
    try:
        key = load_der_public_key(spki)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise bad from error
    x25519 = isinstance(key, X25519PublicKey)
    p256 = isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)
    # One key, one form: its digest stands in evidence and on record.
    if not (x25519 or p256) or key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != spki:
        raise bad
    if isinstance(key, X25519PublicKey):
        try:
            X25519PrivateKey.generate().exchange(key)
        except ValueError as error:  # a point of low order, to which nothing can be wrapped
            raise bad from error
    return key  # type: ignore[return-value]


def wrap(secret: bytes, recipient: Recipient, context: bytes) -> bytes:
    """Encapsulated key, then ciphertext."""
    suite = _X25519 if isinstance(recipient, X25519PublicKey) else _P256
    return suite.encrypt(secret, recipient, info=hpke_info(context))
