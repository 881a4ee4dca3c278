"""One platform under judgement: what came along, what the relying party demands, what the steps found out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeVar

from cryptography import x509

from cgpu_agent.verifier.chain import CertificatePath
from cgpu_agent.verifier.keys import PublicKey
from cgpu_agent.verifier.roots.platform import SHIPPED, PlatformPins
from cgpu_agent.wire.hcl import RuntimeClaims
from cgpu_agent.wire.snp import Product, SnpReport, Tcb
from cgpu_agent.wire.tdx import TdBody, TdQuote

T = TypeVar("T")

Tee = Literal["sev-snp", "tdx", "none"]


@dataclass(frozen=True, slots=True)
class PlatformEvidence:
    """What came along; all of it may be hostile.

    Attributes:
        report: an HCL report, or a bare ATTESTATION_REPORT or TD quote.
        claims: runtime claims beside a bare report, exactly as they were hashed; an HCL report has its own.
        td_quote: the TD quote over an HCL report's TDREPORT.
        certificates: of AMD, in any order: VCEK or VLEK, its CA, the root.
        ak_certificate: the platform AK's certificate (DER or PEM, zero padding allowed).
        ca_certificates: of Azure's vTPMs, in any order, the root among them.
    """

    report: bytes | None = None
    claims: bytes | None = None
    td_quote: bytes | None = None
    certificates: Sequence[x509.Certificate] = ()
    ak_certificate: bytes | None = None
    ca_certificates: Sequence[x509.Certificate] = ()


@dataclass(frozen=True, slots=True)
class SnpFloor:
    """Lowest security version to accept, for each field; ``None``: any."""

    bootloader: int | None = None
    tee: int | None = None
    snp: int | None = None
    microcode: int | None = None
    fmc: int | None = None
    guest_svn: int | None = None


@dataclass(frozen=True, slots=True)
class TdxFloor:
    """The same for TDX: ``tee_tcb_svn`` is up to 16 bytes, compared one by one; ``qe_svn`` that of the enclave."""

    tee_tcb_svn: bytes | None = None
    qe_svn: int | None = None


@dataclass(frozen=True, slots=True)
class PlatformParty:
    """Who judges.

    Attributes:
        at: the moment of judgement, with a time zone.
        pins: root keys and paravisors that are believed.
        snp_floor, tdx_floor: minimum versions.
        require_fresh: refuse a report that was not made for this batch.
    """

    at: datetime
    pins: PlatformPins = SHIPPED
    snp_floor: SnpFloor = field(default_factory=SnpFloor)
    tdx_floor: TdxFloor = field(default_factory=TdxFloor)
    require_fresh: bool = False


@dataclass(frozen=True, slots=True)
class PlatformFacts:
    """What signed bytes said; of refused evidence there are none.

    Attributes:
        product: AMD's processor family.
        code: name of the pinned paravisor, or of the module below it.
        measurement: of what was launched (SNP measurement, MRTD).
        signer: id key digest, or MRSEAM.
        guest_svn: security version of the guest's image (SNP).
        tcb: firmware versions by field.
        secure_boot, vm_unique_id: by the paravisor's claims.
        path: certificates of the key that signed the report, or of the AK.
    """

    product: Product | None = None
    code: str | None = None
    measurement: bytes | None = None
    signer: bytes | None = None
    guest_svn: int | None = None
    tcb: Mapping[str, object] = field(default_factory=dict)
    secure_boot: bool | None = None
    vm_unique_id: str | None = None
    path: CertificatePath | None = None

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it; digests in hex."""
        return {
            "certificates": [] if self.path is None else self.path.to_json(),
            "code": self.code,
            "guest_svn": self.guest_svn,
            "measurement": None if self.measurement is None else self.measurement.hex(),
            "product": self.product,
            "secure_boot": self.secure_boot,
            "signer": None if self.signer is None else self.signer.hex(),
            "tcb": dict(self.tcb),
            "vm_unique_id": self.vm_unique_id,
        }


@dataclass(slots=True)
class PlatformCase:
    """What was given, then what the steps so far found out."""

    evidence: PlatformEvidence
    party: PlatformParty
    ak: PublicKey | None
    pcrs: Mapping[int, bytes] | None
    root: bytes | None
    claims_bytes: bytes | None = None
    claims: RuntimeClaims | None = None
    claimed_ak: PublicKey | None = None
    report_data: bytes | None = None
    snp: SnpReport | None = None
    product: Product | None = None
    tcb: Tcb | None = None
    leaf: x509.Certificate | None = None
    path: CertificatePath | None = None
    td: TdBody | None = None
    quote: TdQuote | None = None
    code: str | None = None
    fresh: bool = False

    def facts(self) -> PlatformFacts:
        """What the steps found, once they have all passed."""
        claims = self.claims
        secure_boot = None if claims is None else claims.secure_boot
        vm_unique_id = None if claims is None else claims.vm_unique_id
        if self.snp is not None:
            return PlatformFacts(
                product=self.product,
                code=self.code,
                measurement=self.snp.measurement,
                signer=self.snp.id_key_digest,
                guest_svn=self.snp.guest_svn,
                tcb={} if self.tcb is None else self.tcb.to_json(),
                secure_boot=secure_boot,
                vm_unique_id=vm_unique_id,
                path=self.path,
            )
        if self.quote is not None:
            body = self.quote.body
            return PlatformFacts(
                code=self.code,
                measurement=body.mrtd,
                signer=body.mrseam,
                tcb={"qe_svn": self.quote.qe.svn, "tee_tcb_svn": body.tee_tcb_svn.hex()},
                secure_boot=secure_boot,
                vm_unique_id=vm_unique_id,
                path=self.path,
            )
        return PlatformFacts(path=self.path)


def found(value: T | None) -> T:
    """What an earlier step left. A step that was taken out leaves nothing, and that refuses."""
    if value is None:
        raise LookupError("the step that finds this did not run")
    return value
