"""The agent's own judgement of its GPUs: the offline verifier, with roots and collateral of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from cgpu_agent.backends.base import GpuEvidence, GpuInfo
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpucapability import Architecture
from cgpu_agent.verifier.gpucase import DeviceEvidence, GpuParty
from cgpu_agent.verifier.gpuchain import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS, PinnedRoots
from cgpu_agent.verifier.gpufloor import Floors
from cgpu_agent.verifier.gpuset import SetResult, verify_devices
from cgpu_agent.verifier.revocation import CLOCK_SKEW

_ARCHITECTURES = {
    "ampere": Architecture.AMPERE,
    "hopper": Architecture.HOPPER,
    "blackwell": Architecture.BLACKWELL,
}


class Judge(Protocol):
    """Judges all devices together. Runs in a thread: it must be pure."""

    def __call__(
        self, devices: Sequence[tuple[GpuInfo, GpuEvidence]], nonce: bytes, at: datetime, expected: int | None
    ) -> SetResult: ...


@dataclass(frozen=True, slots=True)
class GpuJudge:
    """What the agent trusts for GPUs; see ``GpuParty``.

    Attributes:
        digest: of the files that this was made of: another digest, another judge.
    """

    device_roots: PinnedRoots = NVIDIA_DEVICE_ROOTS
    rim_roots: PinnedRoots = NVIDIA_RIM_ROOTS
    collateral: Collateral = field(default_factory=Collateral)
    floors: Floors = field(default_factory=Floors)
    allow_no_rim: bool = False
    require_revocation: bool = False
    digest: str = ""

    def __call__(
        self, devices: Sequence[tuple[GpuInfo, GpuEvidence]], nonce: bytes, at: datetime, expected: int | None
    ) -> SetResult:
        party = GpuParty(
            at=at,
            nonce=nonce,
            device_roots=self.device_roots,
            rim_roots=self.rim_roots,
            collateral=self.collateral,
            floors=self.floors,
            allow_no_rim=self.allow_no_rim,
            require_revocation=self.require_revocation,
        )
        return verify_devices([_evidence(*each) for each in devices], party, expected_gpus=expected)


def _evidence(info: GpuInfo, evidence: GpuEvidence) -> DeviceEvidence:
    # The driver's words go in as claims: where the signed report says otherwise, they were lies.
    claims = {"driver": info.driver, "vbios": info.vbios}
    return DeviceEvidence(evidence.report, evidence.chain, _ARCHITECTURES.get(info.architecture), claims)


def signed_moments(result: SetResult) -> list[datetime]:
    """Moments that have passed for sure, by who is trusted.

    When the signers of the accepted reference values got their certificates; and when CRLs and OCSP responses were
    made that are soundly signed, fresh or not, by a clock that may have been ahead as far as the verifier allows.
    """
    papers = [
        status.signed - CLOCK_SKEW
        for device in result.devices
        for statuses in device.revocation.values()
        for status in statuses
        if status.signed is not None
    ]
    return papers + [
        rim.verified.path.leaf.not_valid_before_utc
        for device in result.devices
        for rim in device.rims.values()
        if rim.verified is not None
    ]
