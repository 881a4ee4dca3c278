"""One X.509 certificate of a TPM's chain: loaded strictly, read once, and the rules for it alone.

Sources: RFC 5280, 4.2; TCG "EK Credential Profile" 2.5, 3; Azure's AK certificates as seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier import ekclass
from cgpu_agent.verifier.keys import certificate_from_der, certificate_key
from cgpu_agent.wire.der import certificates_of_pem, is_pem, trim_der
from cgpu_agent.wire.text import printable

_SOUND_HASHES: Final = frozenset({"sha256", "sha384", "sha512"})
_CA_EXTENSIONS: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    }
)
# The alternative name holds a TPM's maker, model and version, and is critical where the subject is empty. Nobody here
# decides by it. The EK class is for ``endorsement`` to repeat.
_LEAF_EXTENSIONS: Final = _CA_EXTENSIONS | {ExtensionOID.SUBJECT_ALTERNATIVE_NAME, ekclass.OID}

_SIGNED: Final[set[tuple[bytes, bytes]]] = set()
"""Who was seen to have signed whom, by their fingerprints: the same few CAs stand above every device and manifest,
and only their bytes decide it. Whether they are valid at the moment, and trusted, is asked every time."""
_MAX_SIGNED: Final = 4096

E = TypeVar("E", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a leaf certificate must be for.

    Attributes:
        label: for messages.
        eku: extended key usage that the leaf must have, and that no CA above it may exclude.
        key_usages: names of the key usage bits of which the leaf needs one, if it limits key usage at all.
    """

    label: str
    eku: x509.ObjectIdentifier
    key_usages: tuple[str, ...]


AK: Final = Purpose("AK", x509.ObjectIdentifier("2.23.133.8.3"), ("digital_signature",))
"""tcg-kp-AIKCertificate."""
EK: Final = Purpose("EK", x509.ObjectIdentifier("2.23.133.8.1"), ("key_encipherment", "key_agreement"))
"""tcg-kp-EKCertificate."""


def load_certificate(data: bytes) -> x509.Certificate:
    """Load one certificate, DER or PEM, zero padding allowed (also inside the PEM body).

    Raises ``HostileInput``: ``BAD_CERTIFICATE``, ``BAD_PEM``, and what ``trim_der`` raises.
    """
    found = load_certificates(data)
    if len(found) != 1:
        raise HostileInput("BAD_CERTIFICATE", f"{len(found)} certificates where one is wanted")
    return found[0]


def load_certificates(data: bytes) -> tuple[x509.Certificate, ...]:
    """Load PEM with any number of certificates (at most 16), or one in DER. See ``load_certificate``."""
    if not is_pem(data):
        return (certificate_from_der(trim_der(data)),)
    return tuple(certificate_from_der(der) for der in certificates_of_pem(data))


_PEM_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def load_trusted(data: bytes) -> tuple[x509.Certificate, ...]:
    """Load a relying party's own file of roots: as ``load_certificates``, but text around PEM blocks is a comment.

    For files the reader chose itself, never for evidence.
    """
    blocks = _PEM_BLOCK.findall(data)
    return load_certificates(b"\n".join(blocks) + b"\n" if blocks else data)


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """A certificate read once: everything the rules ask for, so that no later property can raise.

    Names are DER; ``subject_text`` is for people (RFC 4514, printable, cut at 200 characters).
    """

    certificate: x509.Certificate
    sha256: bytes
    subject: bytes
    issuer: bytes
    subject_text: str
    not_before: datetime
    not_after: datetime
    signature_hash: str | None
    ca: bool
    path_length: int | None
    key_usage: x509.KeyUsage | None
    purposes: frozenset[x509.ObjectIdentifier] | None
    constrains_names: bool
    critical: frozenset[x509.ObjectIdentifier]

    @classmethod
    def of(cls, certificate: x509.Certificate) -> CertificateFacts:
        """Read a certificate. Raises ``HostileInput``: ``BAD_CERTIFICATE``, ``WEAK_HASH`` (an unknown one)."""
        try:
            if certificate.version is not x509.Version.v3:
                raise HostileInput("BAD_CERTIFICATE", "a certificate of a version before 3")
            extensions = certificate.extensions
            basic = _extension(extensions, x509.BasicConstraints)
            usages = _extension(extensions, x509.ExtendedKeyUsage)
            hash_algorithm = certificate.signature_hash_algorithm
            return cls(
                certificate=certificate,
                sha256=certificate.fingerprint(SHA256()),
                subject=certificate.subject.public_bytes(),
                issuer=certificate.issuer.public_bytes(),
                subject_text=printable(certificate.subject.rfc4514_string(), 200),
                not_before=certificate.not_valid_before_utc,
                not_after=certificate.not_valid_after_utc,
                signature_hash=None if hash_algorithm is None else hash_algorithm.name,
                ca=basic is not None and basic.ca,
                path_length=None if basic is None else basic.path_length,
                key_usage=_extension(extensions, x509.KeyUsage),
                purposes=None if usages is None else frozenset(usages),
                constrains_names=_extension(extensions, x509.NameConstraints) is not None,
                critical=frozenset(each.oid for each in extensions if each.critical),
            )
        except UnsupportedAlgorithm as error:
            raise HostileInput("WEAK_HASH", "a certificate signed in an unknown way") from error
        except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
            raise HostileInput("BAD_CERTIFICATE", "a certificate with unreadable content") from error


def _extension(extensions: x509.Extensions, kind: type[E]) -> E | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def require_valid(facts: CertificateFacts, at: datetime) -> None:
    """Refuse outside of the validity: ``CERTIFICATE_NOT_YET_VALID``, ``CERTIFICATE_EXPIRED``."""
    if at < facts.not_before:
        raise HostileInput(
            "CERTIFICATE_NOT_YET_VALID", f"{facts.subject_text} is valid from {facts.not_before.isoformat()}"
        )
    if at > facts.not_after:
        raise HostileInput("CERTIFICATE_EXPIRED", f"{facts.subject_text} expired {facts.not_after.isoformat()}")


def require_leaf(facts: CertificateFacts, purpose: Purpose) -> None:
    """Refuse what is no end certificate for the purpose.

    Raises ``HostileInput``: ``WRONG_PURPOSE``, ``UNKNOWN_CRITICAL_EXTENSION``, ``WEAK_KEY``.
    """
    certificate_key(facts.certificate)
    unknown = facts.critical - _LEAF_EXTENSIONS
    if unknown:
        raise HostileInput("UNKNOWN_CRITICAL_EXTENSION", f"{facts.subject_text}: {_dotted(unknown)}")
    if facts.purposes is None or purpose.eku not in facts.purposes:
        raise HostileInput("WRONG_PURPOSE", f"{facts.subject_text} is no {purpose.label} certificate")
    if facts.ca:
        raise HostileInput("WRONG_PURPOSE", f"{facts.subject_text} is a CA, not an {purpose.label}")
    usage = facts.key_usage
    if usage is not None and not any(getattr(usage, name) for name in purpose.key_usages):
        raise HostileInput("WRONG_PURPOSE", f"the key usage of {facts.subject_text} does not fit an {purpose.label}")


def require_ca(facts: CertificateFacts, purpose: Purpose, cas_below: int) -> None:
    """Refuse what may not issue for the purpose with that many CAs between it and the leaf.

    Raises ``HostileInput``: ``NOT_A_CA``, ``PATH_TOO_LONG``, ``WRONG_PURPOSE``, ``UNKNOWN_CRITICAL_EXTENSION``,
    ``WEAK_KEY``.
    """
    certificate_key(facts.certificate)
    unknown = facts.critical - _CA_EXTENSIONS
    if unknown or facts.constrains_names:
        listed = _dotted(unknown or {ExtensionOID.NAME_CONSTRAINTS})
        raise HostileInput("UNKNOWN_CRITICAL_EXTENSION", f"{facts.subject_text}: {listed}")
    if not facts.ca or facts.key_usage is None or not facts.key_usage.key_cert_sign:
        raise HostileInput("NOT_A_CA", f"{facts.subject_text} may not issue certificates")
    if facts.path_length is not None and cas_below > facts.path_length:
        raise HostileInput("PATH_TOO_LONG", f"{facts.subject_text} may not have {cas_below} CAs below it")
    allowed = {purpose.eku, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if facts.purposes is not None and not facts.purposes & allowed:
        raise HostileInput("WRONG_PURPOSE", f"{facts.subject_text} may not issue {purpose.label} certificates")


def _dotted(oids: frozenset[x509.ObjectIdentifier] | set[x509.ObjectIdentifier]) -> str:
    return "critical extension " + ", ".join(sorted(oid.dotted_string for oid in oids))


def require_signed(child: CertificateFacts, issuer: CertificateFacts) -> None:
    """Refuse a certificate that the issuer's key did not sign: ``BAD_CERTIFICATE_SIGNATURE``, ``WEAK_HASH``."""
    if child.signature_hash not in _SOUND_HASHES:
        raise HostileInput("WEAK_HASH", f"{child.subject_text} is not signed over SHA-256 or better")
    pair = (child.sha256, issuer.sha256)
    if pair in _SIGNED:
        return
    try:
        child.certificate.verify_directly_issued_by(issuer.certificate)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise HostileInput(
            "BAD_CERTIFICATE_SIGNATURE", f"{child.subject_text} is not signed by its issuer"
        ) from error
    if len(_SIGNED) >= _MAX_SIGNED:
        _SIGNED.clear()
    _SIGNED.add(pair)
