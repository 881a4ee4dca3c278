"""The enrolment CA: writes AK certificates (extended key usage tcg-kp-AIKCertificate, RFC 5280).

Two issuers, so that a simulator's AK never comes under a root that vouches for TPMs: not even a verifier that ignores
the EK class could take one for the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from cgpu_agent.errors import HostileInput, Misuse, Unavailable
from cgpu_agent.service.enrol import Enrolment
from cgpu_agent.verifier.certificate import AK, CertificateFacts, require_ca
from cgpu_agent.verifier.keys import certificate_key, same_key

CLOCK_TOLERANCE: Final = timedelta(minutes=5)
"""A certificate is valid from a little before it was made: relying parties' clocks differ."""

_SIGN_ONLY: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA certificate and its key. Raises ``Misuse`` (``BAD_ISSUER``) where they do not fit."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey = field(repr=False)

    def __post_init__(self) -> None:
        try:
            require_ca(CertificateFacts.of(self.certificate), AK, cas_below=0)
            if not same_key(certificate_key(self.certificate), self.key.public_key()):
                raise HostileInput("BAD_ISSUER", "the key is not that of the certificate")
        except HostileInput as error:
            raise Misuse("BAD_ISSUER", f"the enrolment CA: {error.message}") from error


@dataclass(frozen=True, slots=True)
class Issuers:
    """Who certifies AKs: beside a certified EK, and beside a simulated one."""

    genuine: Issuer | None
    simulated: Issuer | None

    def of(self, enrolment: Enrolment) -> Issuer:
        """Raises ``Unavailable`` (``NOT_ENROLLING``): no CA is configured for this class."""
        found = self.simulated if enrolment.ek_class.kind == "simulated" else self.genuine
        if found is None:
            raise Unavailable("NOT_ENROLLING", f"no CA certifies AKs beside a {enrolment.ek_class.kind} EK here")
        return found


def issue(enrolment: Enrolment, issuer: Issuer, *, lifetime: timedelta) -> x509.Certificate:
    """The AK's certificate. Its times count from the challenge, and it ends no later than its CA and the EK's chain.

    Raises ``Unavailable`` (``NOT_ENROLLING``): the CA has expired.
    """
    made = datetime.fromtimestamp(enrolment.issued_at, timezone.utc)
    end = min(made + lifetime, issuer.certificate.not_valid_after_utc)
    if enrolment.not_after < end.timestamp():
        end = datetime.fromtimestamp(enrolment.not_after, timezone.utc)
    if end <= made:
        raise Unavailable("NOT_ENROLLING", "the enrolment CA has expired")
    name = (enrolment.ak.name or b"").hex()
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"cgpu AK {name[-40:]}")]))
        .issuer_name(issuer.certificate.subject)
        .public_key(enrolment.ak.key)
        .serial_number(enrolment.serial)
        .not_valid_before(made - CLOCK_TOLERANCE)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGN_ONLY, critical=True)
        .add_extension(x509.ExtendedKeyUsage([AK.eku]), critical=False)
        .add_extension(authority, critical=False)
        .add_extension(enrolment.ek_class.extension(), critical=True)
        .sign(issuer.key, SHA256())
    )
