"""Keys and certificates of software GPUs, all derived from one seed, so that a restart keeps every identity.

P-384 with SHA-384 throughout, as NVIDIA's. Whoever knows the seed is every device and both roots.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

Extension = tuple[x509.ExtensionType, bool]

SEED_SIZE: Final = 32
BEGIN: Final = datetime(2025, 1, 1, tzinfo=timezone.utc)
FOREVER: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc)
"""RFC 5280, 4.1.2.5: no well-defined end."""

_ORDER: Final = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not signs,
        crl_sign=not signs,
        encipher_only=False,
        decipher_only=False,
    )


CA: Final[tuple[Extension, ...]] = (
    (x509.BasicConstraints(ca=True, path_length=None), True),
    (_usage(signs=False), True),
)
SIGNER: Final[tuple[Extension, ...]] = ((_usage(signs=True), True),)


@dataclass(frozen=True, slots=True)
class Seed:
    """The secret from which everything is derived: 32 bytes."""

    value: bytes

    def derive(self, label: str, size: int) -> bytes:
        """``size`` (at most 64) bytes that belong to this label."""
        return hmac.digest(self.value, label.encode(), hashlib.sha512)[:size]

    def key(self, label: str) -> ec.EllipticCurvePrivateKey:
        """The private key of this label; 512 bits reduced to 384 leave no bias worth a word."""
        number = int.from_bytes(self.derive(f"key/{label}", 64), "big") % (_ORDER - 1) + 1
        return ec.derive_private_key(number, ec.SECP384R1())

    def serial(self, label: str) -> int:
        """A serial number of at most 16 bytes."""
        return int.from_bytes(self.derive(f"serial/{label}", 16), "big")


@dataclass(frozen=True, slots=True)
class Signer:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def sign(self, data: bytes) -> bytes:
        """ECDSA over SHA-384 as r || s, 96 bytes."""
        r, s = decode_dss_signature(self.key.sign(data, ec.ECDSA(hashes.SHA384())))
        return r.to_bytes(48, "big") + s.to_bytes(48, "big")


def root(seed: Seed, common: str) -> Signer:
    """A self-signed root."""
    key = seed.key(common)
    return Signer(key, _certificate(key, _name(common), key.public_key(), _name(common), CA, seed.serial(common)))


def issue(
    seed: Seed,
    issuer: Signer,
    common: str,
    extensions: Sequence[Extension] = CA,
    *,
    label: str | None = None,
    serial: int | None = None,
    begin: datetime = BEGIN,
    end: datetime = FOREVER,
) -> Signer:
    """A certificate below ``issuer``; ``label`` names its key where the common name is not unique."""
    label = common if label is None else label
    key = seed.key(label)
    serial = seed.serial(label) if serial is None else serial
    certificate = _certificate(
        issuer.key, issuer.certificate.subject, key.public_key(), _name(common), extensions, serial, begin, end
    )
    return Signer(key, certificate)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    signer: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    extensions: Sequence[Extension],
    serial: int,
    begin: datetime = BEGIN,
    end: datetime = FOREVER,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA384())


def pem(certificates: Sequence[x509.Certificate]) -> bytes:
    """Certificates as PEM, in the order given."""
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def crl(issuer: Signer, revoked: Sequence[x509.Certificate], begin: datetime, end: datetime) -> bytes:
    """DER of a CRL of ``issuer`` that revokes these certificates."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(begin)
        .next_update(end)
    )
    for each in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(each.serial_number).revocation_date(begin)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(issuer.key, hashes.SHA384()).public_bytes(Encoding.DER)
