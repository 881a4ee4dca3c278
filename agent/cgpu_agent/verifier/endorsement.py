"""Who vouches for an AK. Without this, a perfect quote may come from a TPM that somebody wrote last night."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from cryptography import x509

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import AK, load_certificate
from cgpu_agent.verifier.chain import CertificatePath, verify_chain
from cgpu_agent.verifier.keys import AttestationKey, certificate_key, same_key

EndorsementKind = Literal["ak-certificate", "pinned", "none"]


@dataclass(frozen=True, slots=True)
class Endorsement:
    """The answer.

    Attributes:
        kind: ``ak-certificate`` (a trusted root leads to a certificate of this very key), ``pinned`` (the relying
            party lists this AK's Name), or ``none``.
        reason: stable word for ``none`` (``unendorsed``), else empty.
        detail: one sentence, safe to show.
        path: the certificates, for ``ak-certificate``.
        pinned: whether the Name is on the list, whatever the kind. A certificate tells the maker, the list whose VM.
    """

    kind: EndorsementKind
    reason: str
    detail: str
    path: CertificatePath | None
    pinned: bool

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        return {
            "detail": self.detail,
            "kind": self.kind,
            "path": [] if self.path is None else self.path.to_json(),
            "pinned": self.pinned,
            "reason": self.reason,
        }


def endorse(
    ak: AttestationKey,
    *,
    certificate: bytes | None,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    pinned_names: frozenset[bytes],
    at: datetime,
) -> Endorsement:
    """Say who vouches for the AK.

    A certificate that is there must be good: one for another key is a splice, and one that fails against given roots
    is no reason to fall back to ``none``, nor to the pinned list. Whether ``none`` is enough is for policy to say.

    Args:
        ak: the AK that signed.
        certificate: its certificate as evidence carries it (DER or PEM, zero padding allowed).
        intermediates: CA certificates, from anywhere.
        roots: the relying party's trust anchors for AK certificates.
        pinned_names: AK Names that the relying party enrolled; only a key with TPMT_PUBLIC has a Name.
        at: the moment of judgement, with a time zone.

    Raises:
        HostileInput: ``AK_CERTIFICATE_MISMATCH``, and what ``load_certificate`` and ``verify_chain`` raise.
    """
    pinned = _is_pinned(ak.name, pinned_names)
    path = None if certificate is None else _certified(ak, certificate, intermediates, roots, at)
    if path is not None:
        root = path.certificates[-1].subject
        return Endorsement("ak-certificate", "", f"certified as an AK below {root}", path, pinned)
    if pinned:
        return Endorsement("pinned", "", "the AK's Name is on the relying party's list", None, pinned)
    missing = "no AK certificate came along" if certificate is None else "no root for AK certificates is configured"
    return Endorsement("none", "unendorsed", f"nobody vouches for this AK: {missing}", None, pinned)


def _certified(
    ak: AttestationKey,
    certificate: bytes,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    at: datetime,
) -> CertificatePath | None:
    leaf = load_certificate(certificate)
    if not same_key(certificate_key(leaf), ak.key):
        raise HostileInput("AK_CERTIFICATE_MISMATCH", "the AK certificate is for another key than the AK")
    if not roots:
        return None
    return verify_chain(leaf, intermediates, roots, purpose=AK, at=at)


def _is_pinned(name: bytes | None, pinned_names: Iterable[bytes]) -> bool:
    return name is not None and any(hmac.compare_digest(name, each) for each in pinned_names)
