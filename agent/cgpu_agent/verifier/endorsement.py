"""Who vouches for an AK. Without this, a perfect quote may come from a TPM that somebody wrote last night."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from cryptography import x509

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import AK, load_certificate
from cgpu_agent.verifier.chain import CertificatePath, verify_chain
from cgpu_agent.verifier.ekclass import EkKind, ek_class_of
from cgpu_agent.verifier.keys import AttestationKey, certificate_key, same_key

EndorsementKind = Literal[
    "amd-sev-snp",
    "intel-tdx",
    "azure-trusted-launch",
    "ak-certificate",
    "tpm-vendor-ek",
    "operator-ek",
    "simulated-ek",
    "pinned",
    "none",
]

_ENROLLED: Final[dict[EkKind, EndorsementKind]] = {
    "vendor": "tpm-vendor-ek",
    "operator": "operator-ek",
    "simulated": "simulated-ek",
}


@dataclass(frozen=True, slots=True)
class Endorsement:
    """The answer.

    Attributes:
        kind: ``amd-sev-snp`` or ``intel-tdx`` (the processor, see ``hardware``), ``ak-certificate`` (a trusted root
            leads to a certificate of this very key), ``azure-trusted-launch`` (the same below Azure's root),
            ``tpm-vendor-ek``, ``operator-ek`` or ``simulated-ek`` (likewise, but an enrolment CA signed, which saw
            the AK beside an EK of that class and knows no more than the EK's certificate), ``pinned`` (the relying
            party lists this AK's Name), or ``none``.
        reason: stable word for ``none`` (``unendorsed``), else empty.
        detail: one sentence, safe to show.
        path: the certificates, where the kind rests on one.
        pinned: whether the Name is on the list, whatever the kind. A certificate tells the maker, the list whose VM.
        ak_name: the platform AK's Name, which names the instance; ``None`` for a bare key.
        simulated: the certificate leads to the root of a simulator, or an enrolment CA saw a simulator's EK.
            Concluded from who signed, never from what the evidence says of itself.
        ek_class: of the EK that an enrolment CA saw (``vendor:NAME``, ``operator``, ``simulated``), else ``None``.
    """

    kind: EndorsementKind
    reason: str
    detail: str
    path: CertificatePath | None
    pinned: bool
    ak_name: bytes | None = None
    simulated: bool = False
    ek_class: str | None = None

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        return {
            "ak_name": None if self.ak_name is None else self.ak_name.hex(),
            "detail": self.detail,
            "ek_class": self.ek_class,
            "kind": self.kind,
            "path": [] if self.path is None else self.path.to_json(),
            "pinned": self.pinned,
            "reason": self.reason,
            "simulated": self.simulated,
        }


def endorse(
    ak: AttestationKey,
    *,
    certificate: bytes | None,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    pinned_names: frozenset[bytes],
    at: datetime,
    simulated_roots: Sequence[x509.Certificate] = (),
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
        simulated_roots: roots of simulators. A certificate that leads to one of them endorses, and is told apart.

    Raises:
        HostileInput: ``AK_CERTIFICATE_MISMATCH``, and what ``load_certificate`` and ``verify_chain`` raise.
    """
    pinned = _is_pinned(ak.name, pinned_names)
    path, simulated, ek_class = None, False, None
    if certificate is not None:
        leaf = load_certificate(certificate)
        if not same_key(certificate_key(leaf), ak.key):
            raise HostileInput("AK_CERTIFICATE_MISMATCH", "the AK certificate is for another key than the AK")
        path, simulated = _certified(leaf, intermediates, roots, simulated_roots, at)
        ek_class = ek_class_of(leaf)
    if path is not None:
        detail = f"certified as an AK below {path.certificates[-1].subject}" + (", a simulator" if simulated else "")
        if ek_class is None:
            return Endorsement("ak-certificate", "", detail, path, pinned, ak.name, simulated)
        kind, simulated = _ENROLLED[ek_class.kind], simulated or ek_class.kind == "simulated"
        detail += f", enrolled beside an EK of class {ek_class}"
        return Endorsement(kind, "", detail, path, pinned, ak.name, simulated, ek_class.text)
    if pinned:
        return Endorsement("pinned", "", "the AK's Name is on the relying party's list", None, pinned, ak.name)
    missing = "no AK certificate came along" if certificate is None else "no root for AK certificates is configured"
    return Endorsement("none", "unendorsed", f"nobody vouches for this AK: {missing}", None, pinned, ak.name)


def _certified(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    simulated_roots: Sequence[x509.Certificate],
    at: datetime,
) -> tuple[CertificatePath | None, bool]:
    """The path to a root, and whether it is a simulator's: that of a certificate which leads to both."""
    if simulated_roots:
        try:
            return verify_chain(leaf, intermediates, simulated_roots, purpose=AK, at=at), True
        except HostileInput:
            if not roots:
                raise
    if not roots:
        return None, False
    return verify_chain(leaf, intermediates, roots, purpose=AK, at=at), False


def _is_pinned(name: bytes | None, pinned_names: Iterable[bytes]) -> bool:
    return name is not None and any(hmac.compare_digest(name, each) for each in pinned_names)
