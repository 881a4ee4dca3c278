"""Who vouches for the vTPM: the CPU under a known paravisor, the cloud that runs the vTPM, or nobody.

On a Confidential VM the processor signs a report whose data are the digest of claims that name the AK; what code
made these claims is part of the same report. On a Trusted VM the cloud certifies the AK of a TPM that its own host
emulates. Evidence that has a hardware report is judged by it: where that fails, a certificate is no way round.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import AK, load_certificate
from cgpu_agent.verifier.chain import MAX_CERTIFICATES, verify_chain
from cgpu_agent.verifier.gpuchain import spki_digest
from cgpu_agent.verifier.keys import PublicKey, certificate_key, require_strong, same_key
from cgpu_agent.verifier.platformcase import (
    PlatformCase,
    PlatformEvidence,
    PlatformFacts,
    PlatformParty,
    Tee,
    found,
)
from cgpu_agent.verifier.platformsnp import SNP_CHECKS, SNP_REQUIRED
from cgpu_agent.verifier.platformtdx import TDX_CHECKS, TDX_REQUIRED
from cgpu_agent.verifier.teechain import common_name
from cgpu_agent.verifier.verdict import Check, Outcome, Skip, Step, Steps
from cgpu_agent.wire.hcl import Jwk, ReportType, is_hcl, parse_claims, parse_hcl
from cgpu_agent.wire.snp import parse_snp_report
from cgpu_agent.wire.tdx import is_td_quote, parse_td_quote, parse_tdreport
from cgpu_agent.wire.tpm import extend

EndorsedBy = Literal["amd-sev-snp", "intel-tdx", "azure-trusted-launch", "none"]
Freshness = Literal["this-batch", "boot"]

TRUSTED: Final[Mapping[EndorsedBy, str]] = {
    "amd-sev-snp": "AMD and the pinned paravisor are trusted, the cloud operator's host is not",
    "intel-tdx": "Intel and the pinned paravisor are trusted, the cloud operator's host is not",
    "azure-trusted-launch": "cloud operator trusted: its host emulates the vTPM, and can make it say anything",
    "none": "nobody vouches for this vTPM",
}
"""Who must be honest, in words."""
_BATCH: Final = b"cgpu/platform/1"
_CONFIDENTIAL_VM: Final = ".ConfidentialVM.Azure.windows.net"


@dataclass(frozen=True, slots=True)
class PlatformEndorsement:
    """The answer.

    Attributes:
        endorsed_by: who vouches for the AK.
        reason: a few stable words for ``none`` ("unknown paravisor", "no claims"), else empty.
        trusted: in words, who must be honest for it to hold.
        tee: what made the report.
        platform_freshness: ``this-batch`` where the report was made for this batch of evidence, else ``boot``.
        steps: every step, in order.
        ak: the endorsed key; ``None`` where nobody vouches for it.
        facts: what signed bytes said; empty where a step refused.
    """

    endorsed_by: EndorsedBy
    reason: str
    trusted: str
    tee: Tee
    platform_freshness: Freshness
    steps: tuple[Step, ...]
    ak: PublicKey | None = None
    facts: PlatformFacts = field(default_factory=PlatformFacts)

    @property
    def refusal(self) -> Step | None:
        """The step that refused."""
        return next((step for step in self.steps if step.outcome is Outcome.REFUSE), None)

    @property
    def warnings(self) -> tuple[Step, ...]:
        """Skipped steps, each of which leaves a doubt (``NO_FLOOR``); none where a step refused."""
        return () if self.refusal else tuple(step for step in self.steps if step.outcome is Outcome.SKIP)

    def passed(self, step_id: str) -> bool:
        """Whether that step passed; a skipped one did not."""
        return any(step.id == step_id and step.outcome is Outcome.PASS for step in self.steps)

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it. ``ak``: SHA-256 of its SubjectPublicKeyInfo in hex."""
        spki = None if self.ak is None else self.ak.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return {
            "ak": None if spki is None else hashlib.sha256(spki).hexdigest(),
            "claims": self.facts.to_json(),
            "endorsed_by": self.endorsed_by,
            "platform_freshness": self.platform_freshness,
            "reason": self.reason,
            "steps": [step.to_json() for step in self.steps],
            "tee": self.tee,
            "trusted": self.trusted,
            "warnings": {step.slug or step.id: step.detail for step in self.warnings},
        }


def batch_user_data(root: bytes) -> bytes:
    """The 64 bytes that make a report one of this batch: SHA-512("cgpu/platform/1" || root of the statements)."""
    return hashlib.sha512(_BATCH + root).digest()


def pcr6_values(vm_unique_id: str) -> frozenset[bytes]:
    """What PCR 6 (SHA-256) may be on the VM of that UUID. Azure's firmware measures it; a step more since 2026."""
    first = hashlib.sha256(f"UUID: {vm_unique_id.upper()}".encode()).digest()
    machine = hashlib.sha256(b'{"MachineArchitecture": "X64"}').digest()
    separator = hashlib.sha256(bytes(4)).digest()
    values = set()
    for events in ((first, separator), (first, machine, separator)):
        value = bytes(32)
        for event in events:
            value = extend("sha256", value, event)
        values.add(value)
    return frozenset(values)


def _judge_format(case: PlatformCase) -> str:
    evidence, data = case.evidence, found(case.evidence.report)
    if is_hcl(data):
        if evidence.claims is not None:
            raise HostileInput("TWO_CLAIMS", "an HCL report has claims of its own: others beside it bind nothing")
        report = parse_hcl(data)
        case.claims_bytes = report.claims
        if report.kind is ReportType.TDX:
            case.td = parse_tdreport(report.hardware)
            case.report_data = case.td.report_data
            return "an HCL report with a TDREPORT"
        case.snp = parse_snp_report(report.hardware)
        text = "an HCL report with an SNP report"
    elif is_td_quote(data):
        case.quote = parse_td_quote(data)
        case.report_data, text = case.quote.body.report_data, "a bare TD quote"
    else:
        case.snp, text = parse_snp_report(data), "a bare SNP report"
    if evidence.td_quote is not None:
        raise HostileInput("WRONG_TYPE", "a TD quote beside a report that it cannot be about")
    if case.snp is not None:
        case.report_data = case.snp.report_data
    if case.claims_bytes is None:
        case.claims_bytes = evidence.claims
    return text


def _judge_binding(case: PlatformCase) -> str | Skip:
    if case.claims_bytes is None:
        return Skip("NO_CLAIMS", "no runtime claims came along, so the report is about no vTPM")
    expected = hashlib.sha256(case.claims_bytes).digest() + bytes(32)
    if not hmac.compare_digest(found(case.report_data), expected):
        raise HostileInput("REPORT_DATA_MISMATCH", "the report binds other claims than these")
    return "SHA-256 of the claims' bytes, then zeros"


def _judge_claims(case: PlatformCase) -> str | Skip:
    if case.claims_bytes is None:
        return Skip("NO_CLAIMS", "no runtime claims came along")
    case.claims = parse_claims(case.claims_bytes)
    case.claimed_ak = _jwk_key(case.claims.ak)
    return f"VM {case.claims.vm_unique_id}, Secure Boot {'on' if case.claims.secure_boot else 'off'}"


def _jwk_key(jwk: Jwk) -> PublicKey:
    try:
        key = RSAPublicNumbers(jwk.exponent, jwk.modulus).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_KEY", "HCLAkPub is no RSA key") from error
    return require_strong(key)


def _judge_ak(case: PlatformCase) -> str | Skip:
    if case.claimed_ak is None:
        return Skip("NO_CLAIMS", "no runtime claims came along")
    if case.ak is None:
        return Skip("NO_AK", "no AK to compare with: what is endorsed is the one that the claims name")
    if not same_key(case.ak, case.claimed_ak):
        raise HostileInput("AK_MISMATCH", "the report is about another AK than this one")
    return "HCLAkPub is this AK"


def _judge_certificate(case: PlatformCase) -> str | Skip:
    if case.evidence.ak_certificate is None:
        return Skip("NO_AK_CERTIFICATE", "no AK certificate came along")
    leaf = load_certificate(case.evidence.ak_certificate)
    ak = case.ak if case.claimed_ak is None else case.claimed_ak
    if ak is not None and not same_key(certificate_key(leaf), ak):
        raise HostileInput("AK_CERTIFICATE_MISMATCH", "the AK certificate is for another key than the AK")
    authorities = case.evidence.ca_certificates
    if len(authorities) > MAX_CERTIFICATES:
        raise HostileInput("TOO_MANY_CERTIFICATES", f"more than {MAX_CERTIFICATES} certificates to search")
    roots = [each for each in authorities if spki_digest(each) in case.party.pins.azure_vtpm_roots]
    path = verify_chain(leaf, authorities, roots, purpose=AK, at=case.party.at)
    if case.evidence.report is None:
        case.leaf, case.path, case.claimed_ak = leaf, path, certificate_key(leaf)
    return f"certified as an AK below {path.certificates[-1].subject}"


def _judge_hardware(case: PlatformCase) -> Skip:
    if case.leaf is not None and common_name(case.leaf).endswith(_CONFIDENTIAL_VM):
        return Skip(
            "NO_HARDWARE_REPORT",
            "no hardware report, though the certificate is a Confidential VM's: who left it out?",
        )
    return Skip("NO_HARDWARE_REPORT", "no hardware report: nothing here is out of the cloud operator's reach")


def _judge_pcr6(case: PlatformCase) -> str | Skip:
    if case.claims is None:
        return Skip("NO_CLAIMS", "no runtime claims came along")
    value = None if case.pcrs is None else case.pcrs.get(6)
    if value is None:
        return Skip("NO_PCR_VALUES", "no quoted PCR 6 to compare with")
    if not any(hmac.compare_digest(value, each) for each in pcr6_values(case.claims.vm_unique_id)):
        raise HostileInput("PCR6_MISMATCH", "PCR 6 is of another VM than the claims")
    return "PCR 6 follows from the VM's UUID"


def _judge_freshness(case: PlatformCase) -> str | Skip:
    said = None if case.claims is None else case.claims.user_data
    if case.root is not None and said is not None and hmac.compare_digest(said, batch_user_data(case.root)):
        case.fresh = True
        return "made for this batch of evidence"
    if case.party.require_fresh:
        raise HostileInput("STALE_REPORT", "the report was not made for this batch of evidence")
    return Skip("BOOT_TIME_REPORT", "not made for this batch of evidence: as old as the boot, or older")


_FIRST: Final[Sequence[Check[PlatformCase]]] = (
    Check("platform.format", "a hardware report, to the last byte", _judge_format),
    Check("platform.binding", "the report binds exactly these claims", _judge_binding),
    Check("platform.claims", "the claims name an AK and a VM", _judge_claims),
    Check("platform.ak", "the AK they name is the one in question", _judge_ak),
)
_LAST: Final[Sequence[Check[PlatformCase]]] = (
    Check("platform.certificate", "an AK certificate that came along is for this AK", _judge_certificate),
    Check("platform.pcr6", "the quoted PCR 6 is this VM's", _judge_pcr6),
    Check("platform.freshness", "the report was made for this batch", _judge_freshness),
)
SNP_STEPS: Final = (*_FIRST, *SNP_CHECKS, *_LAST)
TDX_STEPS: Final = (*_FIRST, *TDX_CHECKS, *_LAST)
TRUSTED_LAUNCH_STEPS: Final[Sequence[Check[PlatformCase]]] = (
    Check("platform.certificate", "Azure certified this AK as a vTPM's", _judge_certificate),
    Check("platform.hardware", "the processor vouches for the vTPM", _judge_hardware),
    _LAST[2],
)
_BOUND: Final = frozenset({"platform.format", "platform.binding", "platform.claims"})


def endorse_platform(
    evidence: PlatformEvidence,
    party: PlatformParty,
    *,
    ak: PublicKey | None,
    pcrs: Mapping[int, bytes] | None = None,
    root: bytes | None = None,
) -> PlatformEndorsement:
    """Say who vouches for the AK. Never raises for the evidence: whatever is wrong with it is in the answer.

    Args:
        evidence: what came along.
        party: who judges.
        ak: the platform AK in question; ``None``: the endorsed key is for the caller to compare.
        pcrs: SHA-256 PCR values that a quote by this AK confirmed.
        root: Merkle root over the statements of the batch, 32 bytes.
    """
    case = PlatformCase(evidence, party, ak, pcrs, root)
    steps = Steps()
    if evidence.report is None:
        steps.run(TRUSTED_LAUNCH_STEPS, case)
        endorsed = steps.accepted and steps.passed("platform.certificate")
        return _answer(case, steps, "none", "azure-trusted-launch" if endorsed else "none")
    steps.run(_FIRST, case)
    if case.snp is not None:
        steps.run((*SNP_CHECKS, *_LAST), case)
        return _answer(case, steps, "sev-snp", "amd-sev-snp" if _all(steps, SNP_REQUIRED) else "none")
    if case.td is not None or case.quote is not None:
        steps.run((*TDX_CHECKS, *_LAST), case)
        return _answer(case, steps, "tdx", "intel-tdx" if _all(steps, TDX_REQUIRED) else "none")
    return _answer(case, steps, "none", "none")


def _all(steps: Steps, required: frozenset[str]) -> bool:
    return steps.accepted and all(steps.passed(each) for each in required | _BOUND)


def _answer(case: PlatformCase, steps: Steps, tee: Tee, endorsed_by: EndorsedBy) -> PlatformEndorsement:
    return PlatformEndorsement(
        endorsed_by=endorsed_by,
        reason="" if endorsed_by != "none" else _reason(steps),
        trusted=TRUSTED[endorsed_by],
        tee=tee,
        platform_freshness="this-batch" if case.fresh else "boot",
        steps=steps.all,
        ak=None if endorsed_by == "none" else case.claimed_ak,
        facts=case.facts() if steps.refusal is None else PlatformFacts(),
    )


def _reason(steps: Steps) -> str:
    """The slug of what stood in the way, as words."""
    if steps.refusal is not None:
        return (steps.refusal.slug or "").lower().replace("_", " ")
    skipped = [step.slug for step in steps.all if step.outcome is Outcome.SKIP and step.slug is not None]
    return skipped[0].lower().replace("_", " ") if skipped else "nothing was judged"
