"""Certificate chains of CPU makers: three certificates in a fixed order, up to a pinned root key.

AMD's are RSA-PSS over a P-384 key, Intel's are P-256; both are short and come complete, so nothing is searched.
"""

from __future__ import annotations

import hashlib
import hmac
import warnings
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.x509.oid import ExtensionOID, NameOID

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.certificate import CertificateFacts, require_signed, require_valid
from cgpu_agent.verifier.chain import MAX_CERTIFICATES, CertificatePath, PathCertificate
from cgpu_agent.verifier.gpuchain import spki_digest
from cgpu_agent.verifier.keys import certificate_key

CHAIN_LENGTH: Final = 3
"""The key that signs reports, the CA that certified it, the root."""

_HASHES: Final = {"secp256r1": SHA256(), "secp384r1": SHA384()}
_KNOWN_CRITICAL: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})

# AMD numbers its chip certificates 0, of which the library warns; nobody here reads a serial number.
warnings.filterwarnings("ignore", message="Parsed a serial number which wasn't positive")


def common_name(certificate: x509.Certificate) -> str:
    """The subject's common name; empty where there is not exactly one."""
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        return ""
    return str(names[0].value) if len(names) == 1 else ""


def order_chain(certificates: Sequence[x509.Certificate], leaf_names: Collection[str]) -> list[x509.Certificate]:
    """Pick leaf, CA and root by their names from certificates in any order.

    Certificates that are there twice count once. Nothing is verified here.

    Raises:
        HostileInput: ``TOO_MANY_CERTIFICATES``, ``NO_LEAF`` (none with such a common name, or several),
            ``UNKNOWN_ISSUER``, ``AMBIGUOUS_ISSUER``.
    """
    if len(certificates) > MAX_CERTIFICATES:
        raise HostileInput("TOO_MANY_CERTIFICATES", f"more than {MAX_CERTIFICATES} certificates to search")
    distinct = {each.sha256: each for each in map(CertificateFacts.of, certificates)}
    leaves = [each for each in distinct.values() if common_name(each.certificate) in leaf_names]
    if len(leaves) != 1:
        wanted = " or ".join(sorted(leaf_names))
        raise HostileInput("NO_LEAF", f"{len(leaves)} certificates of name {wanted}, one is wanted")
    path = [leaves[0]]
    while len(path) < CHAIN_LENGTH:
        issuers = [each for each in distinct.values() if each.subject == path[-1].issuer]
        if not issuers:
            raise HostileInput("UNKNOWN_ISSUER", f"the issuer of {path[-1].subject_text} did not come along")
        if len(issuers) > 1:
            raise HostileInput("AMBIGUOUS_ISSUER", f"several certificates could have issued {path[-1].subject_text}")
        path.append(issuers[0])
    return [each.certificate for each in path]


def verify_tee_chain(
    certificates: Sequence[x509.Certificate], roots: Collection[bytes], at: datetime
) -> tuple[CertificatePath, bytes]:
    """Verify leaf, CA and root, and return the path with the digest of the root key.

    Every certificate: valid at ``at``, sound key, signed by the next over SHA-256 or better, no unknown critical
    extension. The leaf: no CA, and if it limits key usage, for signing. The others: CAs, path length kept. The root's
    key: one of ``roots``.

    Args:
        certificates: in order, leaf first.
        roots: SHA-256 digests of SubjectPublicKeyInfo.
        at: the moment of judgement, with a time zone.

    Raises:
        HostileInput: ``CHAIN_LENGTH``, ``UNKNOWN_ROOT``, ``WRONG_ISSUER``, ``NOT_A_CA``, ``WRONG_PURPOSE``,
            ``PATH_TOO_LONG``, ``UNKNOWN_CRITICAL_EXTENSION``, ``CERTIFICATE_NOT_YET_VALID``, ``CERTIFICATE_EXPIRED``,
            ``BAD_CERTIFICATE_SIGNATURE``, ``WEAK_HASH``, ``WEAK_KEY``, ``BAD_CERTIFICATE``.
        Misuse: ``NAIVE_TIME``.
    """
    if at.tzinfo is None:
        raise Misuse("NAIVE_TIME", "the moment of judgement needs a time zone")
    if len(certificates) != CHAIN_LENGTH:
        raise HostileInput("CHAIN_LENGTH", f"{len(certificates)} certificates, {CHAIN_LENGTH} are expected")
    for each in certificates:
        certificate_key(each)
    facts = [CertificateFacts.of(each) for each in certificates]
    root = spki_digest(certificates[-1])
    if not any(hmac.compare_digest(root, each) for each in roots):
        raise HostileInput("UNKNOWN_ROOT", f"{facts[-1].subject_text} does not hold a trusted root key")
    for position, (child, issuer) in enumerate(zip(facts, (*facts[1:], facts[-1]), strict=True)):
        _require_role(child, position)
        if child.issuer != issuer.subject:
            raise HostileInput("WRONG_ISSUER", f"{child.subject_text} was not issued by {issuer.subject_text}")
        require_signed(child, issuer)
        require_valid(child, at)
    path = tuple(PathCertificate(each.subject_text, each.sha256.hex(), each.not_after) for each in facts)
    return CertificatePath(path), root


def _require_role(facts: CertificateFacts, position: int) -> None:
    if facts.critical - _KNOWN_CRITICAL or facts.constrains_names:
        raise HostileInput("UNKNOWN_CRITICAL_EXTENSION", f"{facts.subject_text} has constraints not known here")
    usage = facts.key_usage
    if position == 0:
        if facts.ca or (usage is not None and not usage.digital_signature):
            raise HostileInput("WRONG_PURPOSE", f"{facts.subject_text} is not the certificate of a signing key")
        return
    if not facts.ca or usage is None or not usage.key_cert_sign:
        raise HostileInput("NOT_A_CA", f"{facts.subject_text} may not issue certificates")
    if facts.path_length is not None and position - 1 > facts.path_length:
        raise HostileInput("PATH_TOO_LONG", f"{facts.subject_text} may not have {position - 1} CAs below it")


def leaf_key(certificate: x509.Certificate, curve: str) -> EllipticCurvePublicKey:
    """The certified key, which must be on that curve. Raises ``HostileInput`` (``WEAK_KEY`` and others)."""
    key = certificate_key(certificate)
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name != curve:
        raise HostileInput("WEAK_KEY", f"a key that is not on {curve}")
    return key


def require_ecdsa(key: EllipticCurvePublicKey, r: int, s: int, signed: bytes, what: str) -> None:
    """Verify by the hash that belongs to the key's curve. Raises ``HostileInput`` (``BAD_SIGNATURE``)."""
    try:
        key.verify(encode_dss_signature(r, s), signed, ECDSA(_HASHES[key.curve.name]))
    except (InvalidSignature, ValueError) as error:
        raise HostileInput("BAD_SIGNATURE", f"{what} is not signed by this key") from error


def sha256(*parts: bytes) -> bytes:
    """SHA-256 over the parts in a row."""
    return hashlib.sha256(b"".join(parts)).digest()
