"""What a judgement of an NVIDIA device takes, keeps while it runs, and returns. The steps are in ``gpu``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.collateral import Collateral, driver_rim_id, switch_rim_id, vbios_rim_id
from cgpu_agent.verifier.gpucapability import Architecture, Capabilities, capabilities_of
from cgpu_agent.verifier.gpuchain import (
    NVIDIA_DEVICE_ROOT,
    NVIDIA_DEVICE_ROOTS,
    NVIDIA_RIM_ROOTS,
    DeviceIdentity,
    PinnedPath,
    PinnedRoots,
)
from cgpu_agent.verifier.gpufloor import Floors
from cgpu_agent.verifier.gpumeasure import Comparison, Source
from cgpu_agent.verifier.revocation import CertificateStatus
from cgpu_agent.verifier.rim import RimResult
from cgpu_agent.verifier.verdict import Outcome, Step
from cgpu_agent.wire.nvidia import GpuFields, SwitchFields
from cgpu_agent.wire.spdm import NONCE_SIZE, Report

DeviceFields = GpuFields | SwitchFields
Result = Literal["pass", "refused", "unverifiable"]

_EARLY = "a step ran before the one that finds this"


@dataclass(frozen=True, slots=True)
class GpuParty:
    """Who judges, and what it demands.

    Attributes:
        at: the moment of judgement, with a time zone.
        nonce: the 32 bytes that the report must answer; ``None`` = not compared.
        device_roots: root keys trusted for devices. With any but NVIDIA's the verdict says ``simulated``.
        rim_roots: root keys trusted for reference values.
        collateral: reference values and revocation data.
        floors: lowest accepted versions.
        architecture: what the device must be; ``None`` = any that is known.
        allow_no_rim: go on although measurements cannot be compared; the verdict still says so.
        allow_rim_hold: go on although the signer of a RIM is revoked for the time being (certificateHold).
        require_revocation: refuse where any certificate's revocation status is unknown.
        require_fwid: refuse firmware that does not report its FWID.
    """

    at: datetime
    nonce: bytes | None = None
    device_roots: PinnedRoots = NVIDIA_DEVICE_ROOTS
    rim_roots: PinnedRoots = NVIDIA_RIM_ROOTS
    collateral: Collateral = field(default_factory=Collateral)
    floors: Floors = field(default_factory=Floors)
    architecture: Architecture | None = None
    allow_no_rim: bool = False
    allow_rim_hold: bool = False
    require_revocation: bool = False
    require_fwid: bool = False

    def __post_init__(self) -> None:
        """Raises ``Misuse`` (``NAIVE_TIME``, ``BAD_NONCE``)."""
        if self.at.tzinfo is None:
            raise Misuse("NAIVE_TIME", "the moment of judgement needs a time zone")
        if self.nonce is not None and len(self.nonce) != NONCE_SIZE:
            raise Misuse("BAD_NONCE", f"the nonce of a device report has {NONCE_SIZE} bytes")


@dataclass(frozen=True, slots=True)
class DeviceEvidence:
    """What a device, or somebody in its name, handed over.

    Attributes:
        report: SPDM request and response.
        chain: its certificates as PEM, leaf first.
        architecture: what the sender says it is, unsigned.
        claims: further unsigned words of the sender, to compare: ``nonce`` (hex), ``driver``, ``vbios``.
    """

    report: bytes
    chain: bytes
    architecture: Architecture | None = None
    claims: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a device signed, and what its certificates say of it.

    Attributes:
        architecture: by the chip named in its certificate.
        identity: likewise.
        simulated: whether a root other than NVIDIA's vouches for it.
        path: its verified chain.
        nonce: 32 bytes that the report answers.
        fields: what it says of itself.
    """

    architecture: Architecture
    identity: DeviceIdentity
    simulated: bool
    path: PinnedPath
    nonce: bytes
    fields: DeviceFields

    @property
    def driver(self) -> str | None:
        """Driver version, of a GPU."""
        return self.fields.driver if isinstance(self.fields, GpuFields) else None

    @property
    def vbios(self) -> str | None:
        """Firmware version."""
        return self.fields.vbios if isinstance(self.fields, GpuFields) else self.fields.bios

    @property
    def rim_ids(self) -> tuple[str, ...]:
        """Names under which NVIDIA publishes its reference values."""
        if isinstance(self.fields, GpuFields):
            return driver_rim_id(self.architecture, self.fields), vbios_rim_id(self.fields)
        return (switch_rim_id(self.fields),)


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """What one device's evidence showed.

    Attributes:
        result: ``pass``, ``refused``, or ``unverifiable``: nothing is published to judge such a device by.
        steps: every step, in order.
        refusal: the step that refused.
        facts: ``None`` unless chain and signature are good. Where a later step refused, they are still what the
            device signed, and still no reason to trust it.
        rims: the manifests that were judged: ``driver`` and ``firmware``.
        comparison: ``None`` where measurements were not compared.
        revocation: status of the certificates, the device's first, then those of each manifest.
        fwid_matched: ``None`` where the firmware does not report it.
    """

    result: Result
    steps: tuple[Step, ...]
    refusal: Step | None
    facts: DeviceFacts | None
    rims: Mapping[Source, RimResult]
    comparison: Comparison | None
    revocation: Mapping[str, tuple[CertificateStatus, ...]]
    fwid_matched: bool | None

    @property
    def accepted(self) -> bool:
        """Whether the result is ``pass``."""
        return self.result == "pass"

    @property
    def capabilities(self) -> Capabilities | None:
        """What the device protects; ``None`` for a switch, and for a device that did not pass."""
        if self.facts is None or not self.accepted:
            return None
        measured = self.passed("gpu.measurements")
        return capabilities_of(self.facts.architecture, simulated=self.facts.simulated, measured=measured)

    def passed(self, step_id: str) -> bool:
        """Whether that step passed; a skipped one did not."""
        return any(step.id == step_id and step.outcome is Outcome.PASS for step in self.steps)


@dataclass(slots=True)
class Case:
    """One device under judgement: what was given, then what the steps so far found out."""

    evidence: DeviceEvidence
    party: GpuParty
    path: PinnedPath | None = None
    identity: DeviceIdentity | None = None
    architecture: Architecture | None = None
    report: Report | None = None
    signed: bool = False
    fields: DeviceFields | None = None
    fwid_matched: bool | None = None
    rims: dict[Source, RimResult] = field(default_factory=dict)
    comparison: Comparison | None = None
    revocation: dict[str, tuple[CertificateStatus, ...]] = field(default_factory=dict)

    @property
    def chain_path(self) -> PinnedPath:
        """The verified chain."""
        if self.path is None:
            raise LookupError(_EARLY)
        return self.path

    @property
    def parsed(self) -> Report:
        """The parsed report."""
        if self.report is None:
            raise LookupError(_EARLY)
        return self.report

    @property
    def facts(self) -> DeviceFacts:
        """What the device signed."""
        found = self.facts_so_far
        if found is None:
            raise LookupError(_EARLY)
        return found

    @property
    def facts_so_far(self) -> DeviceFacts | None:
        """What the device signed; ``None`` until chain and signature are good and the fields are read."""
        path, identity, architecture = self.path, self.identity, self.architecture
        if not self.signed or path is None or identity is None or architecture is None:
            return None
        if self.report is None or self.fields is None:
            return None
        simulated = path.root != NVIDIA_DEVICE_ROOT
        return DeviceFacts(architecture, identity, simulated, path, self.report.nonce, self.fields)
