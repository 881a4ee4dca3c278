"""Whether certificates of a verified chain were revoked, by OCSP responses and CRLs that somebody brought along.

Nothing is fetched. What is not there, not about this certificate or no longer fresh leaves its status ``unknown``;
what is there and broken is refused; and a revocation counts however old the paper is that says so. Sources: RFC 5280,
5 and 6.3.3; RFC 6960, 3.2 and 4.2.2.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import CertificateFacts, require_signed, require_valid
from cgpu_agent.verifier.gpuchain import PinnedPath
from cgpu_agent.verifier.keys import certificate_key
from cgpu_agent.wire.der import is_pem, pem_blocks

Status = Literal["good", "revoked", "unknown"]
Source = Literal["ocsp", "crl", "none"]

MAX_COLLATERAL: Final = 4 << 20
"""Bytes of one CRL or OCSP response."""
CLOCK_SKEW: Final = timedelta(minutes=5)
"""How far ahead of the judge's clock an issuer's may be; a responder stamps its answer with the very moment."""

_SOUND: Final = ("sha256", "sha384", "sha512")
_ID_HASHES: Final[dict[str, Callable[[], hashes.HashAlgorithm]]] = {
    # SHA-1 only names the issuer here; what is believed is the signature.
    "sha1": hashes.SHA1,
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """What is known of one certificate.

    Attributes:
        subject: its name, for people.
        status: ``good`` by fresh word of its issuer, ``revoked``, or ``unknown``.
        source: what said so.
        reason: revocation reason (``certificate_hold``), or why the status is unknown (``absent``, ``stale``).
        until: end of the freshness of ``good``.
        signed: the newest moment at which its issuer, or who answers for it, verifiably said anything of it
            (thisUpdate, producedAt), fresh or not; by their clock, which may be ahead by ``CLOCK_SKEW``.
    """

    subject: str
    status: Status
    source: Source
    reason: str
    until: datetime | None = None
    signed: datetime | None = None

    @property
    def on_hold(self) -> bool:
        """Whether it is revoked for the time being only."""
        return self.status == "revoked" and self.reason == "certificate_hold"

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        return {
            "reason": self.reason,
            "source": self.source,
            "status": self.status,
            "subject": self.subject,
            "until": None if self.until is None else self.until.isoformat(),
        }


@dataclass(frozen=True, slots=True)
class RevocationData:
    """CRLs and OCSP responses, parsed; signatures are checked against the issuer when they are used.

    Attributes:
        crls: of any issuers.
        responses: successful OCSP responses, about any certificates.
        max_age: refuse to call something fresh that is older than this, whatever its own nextUpdate says.
    """

    crls: tuple[x509.CertificateRevocationList, ...] = ()
    responses: tuple[ocsp.OCSPResponse, ...] = ()
    max_age: timedelta | None = field(default=None)

    @property
    def empty(self) -> bool:
        """Whether nothing was brought along."""
        return not self.crls and not self.responses


def load_crl(data: bytes) -> x509.CertificateRevocationList:
    """Load a CRL, DER or PEM. Raises ``HostileInput``: ``TOO_LARGE``, ``BAD_CRL``, ``BAD_PEM``."""
    _require_size(data, "CRL")
    if is_pem(data):
        blocks = pem_blocks(data)
        if len(blocks) != 1 or blocks[0][0] != "X509 CRL":
            raise HostileInput("BAD_CRL", "PEM: one CRL is wanted")
        data = blocks[0][1]
    try:
        return x509.load_der_x509_crl(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_CRL", "not a certificate revocation list") from error


def load_ocsp(data: bytes) -> ocsp.OCSPResponse:
    """Load an OCSP response, DER. Raises ``HostileInput``: ``TOO_LARGE``, ``BAD_OCSP`` (an error response too)."""
    _require_size(data, "OCSP response")
    try:
        response = ocsp.load_der_ocsp_response(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_OCSP", "not an OCSP response") from error
    if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
        raise HostileInput("BAD_OCSP", f"the responder answered {response.response_status.name.lower()}")
    return response


def _require_size(data: bytes, what: str) -> None:
    if len(data) > MAX_COLLATERAL:
        raise HostileInput("TOO_LARGE", f"{what}: {len(data)} bytes, at most {MAX_COLLATERAL} are allowed")


def chain_status(
    path: PinnedPath, positions: Sequence[int], data: RevocationData, at: datetime
) -> tuple[CertificateStatus, ...]:
    """The status of some certificates of a verified chain.

    Args:
        path: the chain.
        positions: which certificates, 0 = leaf; never the root, whom nobody can revoke.
        data: what was brought along.
        at: the moment of judgement, with a time zone.

    Raises:
        HostileInput: ``BAD_CRL``, ``BAD_OCSP``: something about one of them is not soundly signed by its issuer.
    """
    return tuple(_status(path, position, data, at) for position in positions)


def _status(path: PinnedPath, position: int, data: RevocationData, at: datetime) -> CertificateStatus:
    child, issuer = path.facts[position], path.facts[position + 1]
    words = [_crl_word(crl, child, issuer, data, at) for crl in data.crls if _names(crl.issuer) == child.issuer]
    for response in data.responses:
        words += _ocsp_words(response, child, issuer, data, at)
    words.sort(key=lambda word: word.on_hold)  # a hold, which may be allowed, must not hide a final revocation
    for wanted in ("revoked", "good", "unknown"):
        found = next((word for word in words if word.status == wanted), None)
        if found is not None:
            return replace(found, signed=max(word.signed for word in words if word.signed is not None))
    return CertificateStatus(child.subject_text, "unknown", "none", "absent")


def _names(name: x509.Name) -> bytes:
    return name.public_bytes()


def _word(
    child: CertificateFacts,
    source: Source,
    revoked: str | None,
    updates: tuple[datetime | None, datetime | None],
    max_age: timedelta | None,
    at: datetime,
) -> CertificateStatus:
    """Turn one issuer's word into a status: ``good`` needs freshness, ``revoked`` does not."""
    if revoked is not None:
        return CertificateStatus(child.subject_text, "revoked", source, revoked)
    this_update, next_update = updates
    if max_age is not None and this_update is not None:
        limit = this_update + max_age
        next_update = limit if next_update is None else min(limit, next_update)
    if this_update is None or next_update is None or not this_update - CLOCK_SKEW <= at <= next_update:
        return CertificateStatus(child.subject_text, "unknown", source, "stale")
    return CertificateStatus(child.subject_text, "good", source, "", next_update)


def _crl_word(
    crl: x509.CertificateRevocationList,
    child: CertificateFacts,
    issuer: CertificateFacts,
    data: RevocationData,
    at: datetime,
) -> CertificateStatus:
    usage = issuer.key_usage
    is_root = issuer.issuer == issuer.subject  # its key is pinned; not every certificate of it has cRLSign
    try:
        key = certificate_key(issuer.certificate)
        algorithm = crl.signature_hash_algorithm
        sound = algorithm is not None and algorithm.name in _SOUND and crl.is_signature_valid(key)
        critical = any(each.critical for each in crl.extensions)
        entry = crl.get_revoked_certificate_by_serial_number(child.certificate.serial_number)
        reason = None if entry is None else _reason(entry)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        raise HostileInput("BAD_CRL", "a certificate revocation list with unreadable content") from error
    if not sound or not (is_root or (usage is not None and usage.crl_sign)):
        raise HostileInput("BAD_CRL", f"a CRL in the name of {issuer.subject_text} that it may not or did not sign")
    if critical:
        raise HostileInput("BAD_CRL", f"the CRL of {issuer.subject_text} covers only a part, by an unknown rule")
    word = _word(child, "crl", reason, (crl.last_update_utc, crl.next_update_utc), data.max_age, at)
    return replace(word, signed=crl.last_update_utc)


def _reason(entry: x509.RevokedCertificate) -> str:
    try:
        return entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.name
    except x509.ExtensionNotFound:
        return "unspecified"


def _ocsp_words(
    response: ocsp.OCSPResponse,
    child: CertificateFacts,
    issuer: CertificateFacts,
    data: RevocationData,
    at: datetime,
) -> list[CertificateStatus]:
    try:
        about = [single for single in response.responses if _is_about(single, child, issuer)]
        if not about:
            return []
        _require_responder(response, issuer, at)
        made = response.produced_at_utc
        return [
            replace(_ocsp_word(single, child, data, at), signed=max(made, single.this_update_utc)) for single in about
        ]
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise HostileInput("BAD_OCSP", "an OCSP response with unreadable content or a bad signature") from error


def _ocsp_word(
    single: ocsp.OCSPSingleResponse, child: CertificateFacts, data: RevocationData, at: datetime
) -> CertificateStatus:
    if single.certificate_status is ocsp.OCSPCertStatus.UNKNOWN:
        return CertificateStatus(child.subject_text, "unknown", "ocsp", "the responder does not know it")
    reason = None
    if single.certificate_status is ocsp.OCSPCertStatus.REVOKED:
        reason = "unspecified" if single.revocation_reason is None else single.revocation_reason.name
    return _word(child, "ocsp", reason, (single.this_update_utc, single.next_update_utc), data.max_age, at)


def _is_about(single: ocsp.OCSPSingleResponse, child: CertificateFacts, issuer: CertificateFacts) -> bool:
    if single.serial_number != child.certificate.serial_number:
        return False
    algorithm = _ID_HASHES.get(single.hash_algorithm.name)
    if algorithm is None:
        return False
    name, key = hashes.Hash(algorithm()), hashes.Hash(algorithm())
    name.update(issuer.subject)
    key.update(_key_bits(issuer))
    return hmac.compare_digest(name.finalize(), single.issuer_name_hash) and hmac.compare_digest(
        key.finalize(), single.issuer_key_hash
    )


def _key_bits(issuer: CertificateFacts) -> bytes:
    """The BIT STRING of a P-384 SubjectPublicKeyInfo: the uncompressed point (RFC 6960, 4.1.1)."""
    key = certificate_key(issuer.certificate)
    if not isinstance(key, EllipticCurvePublicKey):
        raise HostileInput("BAD_OCSP", "the issuer has no EC key")
    numbers = key.public_numbers()
    size = (key.key_size + 7) // 8
    return b"\4" + numbers.x.to_bytes(size, "big") + numbers.y.to_bytes(size, "big")


def _require_responder(response: ocsp.OCSPResponse, issuer: CertificateFacts, at: datetime) -> None:
    """The issuer itself signed, or a responder that it certified for just that (RFC 6960, 4.2.2.2)."""
    algorithm = response.signature_hash_algorithm
    if algorithm is None or algorithm.name not in _SOUND:
        raise HostileInput("BAD_OCSP", "an OCSP response that is not signed over SHA-256 or better")
    candidates = [CertificateFacts.of(each) for each in response.certificates[:4]]
    for signer in (issuer, *candidates):
        if not _signed_by(response, signer, algorithm):
            continue
        if signer.sha256 == issuer.sha256:
            return
        if signer.purposes is None or ExtendedKeyUsageOID.OCSP_SIGNING not in signer.purposes:
            raise HostileInput("BAD_OCSP", f"{signer.subject_text} may not answer for {issuer.subject_text}")
        require_signed(signer, issuer)
        require_valid(signer, at)
        return
    raise HostileInput("BAD_OCSP", f"an OCSP response that neither {issuer.subject_text} nor its responder signed")


def _signed_by(response: ocsp.OCSPResponse, signer: CertificateFacts, algorithm: hashes.HashAlgorithm) -> bool:
    key = certificate_key(signer.certificate)
    try:
        if isinstance(key, EllipticCurvePublicKey):
            key.verify(response.signature, response.tbs_response_bytes, ECDSA(algorithm))
        elif isinstance(key, RSAPublicKey):
            key.verify(response.signature, response.tbs_response_bytes, PKCS1v15(), algorithm)
    except InvalidSignature:
        return False
    return True
