"""Makes the keys that the service needs: private ones with mode 0600, and never over another file."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cgpu_agent.errors import Misuse
from cgpu_agent.service import replica
from cgpu_agent.verifier.certificate import AK

CA_YEARS: Final = 5

_CERTIFY_ONLY: Final = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


def signing_key(path: Path) -> None:
    """A P-256 key that signs tokens."""
    write(path, _pem(generate_private_key(SECP256R1())), 0o600)


def replica_key(path: Path) -> None:
    """A key for nonces and tickets, shared by all replicas."""
    write(path, replica.generate(), 0o600)


def enrolment_ca(path: Path, certificate_path: Path, name: str, *, now: datetime | None = None) -> None:
    """A P-256 key and its self-signed certificate, good for AK certificates right below it and for nothing else."""
    key = generate_private_key(SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = now or datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - timedelta(minutes=5))
        .not_valid_after(begin + timedelta(days=365 * CA_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_CERTIFY_ONLY, critical=True)
        .add_extension(x509.ExtendedKeyUsage([AK.eku]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )
    write(path, _pem(key), 0o600)
    try:
        write(certificate_path, certificate.public_bytes(Encoding.PEM), 0o644)
    except Misuse:
        path.unlink()  # a key without its certificate would stand in the way of the next try
        raise


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write(path: Path, data: bytes, mode: int) -> None:
    """Make a file. Raises ``Misuse``: ``FILE_EXISTS``, ``NO_FILE``."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except FileExistsError:
        raise Misuse(
            "FILE_EXISTS", f"{path} is there already, and is not overwritten: move it away, or choose another name"
        ) from None
    except OSError as error:
        raise Misuse("NO_FILE", f"{path}: {error.strerror}") from error
