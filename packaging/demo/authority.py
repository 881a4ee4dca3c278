"""A throw-away CA that does for the demo's TPM what a cloud does for a real one: certify its AK."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509.oid import NameOID

_AK_PURPOSE = x509.ObjectIdentifier("2.23.133.8.3")  # tcg-kp-AIKCertificate


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certify(ak_spki: bytes, days: int = 30) -> tuple[bytes, bytes]:
    """Make a CA, certify one AK, forget the CA's key.

    Args:
        ak_spki: the AK as DER SubjectPublicKeyInfo.
        days: validity of both certificates.

    Returns:
        The AK certificate in DER and the root in PEM.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name("cgpu-agent demo CA (throw-away)")
    now = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(minutes=5)
    until = now + datetime.timedelta(days=days)
    usage = {
        "digital_signature": False,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": True,
        "crl_sign": True,
        "encipher_only": False,
        "decipher_only": False,
    }
    root = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(key, hashes.SHA256())
    )
    leaf_usage = {**usage, "digital_signature": True, "key_cert_sign": False, "crl_sign": False}
    leaf = (
        x509.CertificateBuilder()
        .subject_name(_name("demo software TPM AK"))
        .issuer_name(subject)
        .public_key(load_der_public_key(ak_spki))  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(until)
        .add_extension(x509.KeyUsage(**leaf_usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_AK_PURPOSE]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return leaf.public_bytes(Encoding.DER), root.public_bytes(Encoding.PEM)
