"""What verified evidence shows, in the words that an appraisal policy tests: one complete record, nothing absent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final, Literal

from cgpu_agent.cedar.engine import Entity
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.coverage import CoverageKind
from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.verifier.gpufacts import GpuFacts, gather_gpus
from cgpu_agent.verifier.platform import PlatformEndorsement
from cgpu_agent.verifier.reference import Reference, is_instance
from cgpu_agent.wire.eventlog import EventLog

_BANK: Final = "sha256"
_HARDWARE: Final = frozenset({"amd-sev-snp", "intel-tdx"})
_SECURE_BOOT_PCR: Final = 7
_DEBUG_MODE: Final = hashlib.sha256(b"UEFI Debug Mode").digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(GpuFacts):
    """The claims of ``CGpu::Claims`` in ``cedar/appraisal.cedarschema``, which says what each value means."""

    endorsement: str
    simulated: bool
    platform_freshness: Literal["this-batch", "boot", "none"]
    platform_floor: Literal["kept", "none-configured"]
    instance: Literal["pinned", "any"]
    boot_log: Literal["explained", "none"]
    secure_boot: str
    debug: Literal["on", "off", "unknown"]
    agent_coverage: CoverageKind
    reference: Literal["match", "differs", "not-given"]
    reference_pcrs: frozenset[int]
    reference_pins: frozenset[str]
    lane: str
    purpose: str
    key_id: str
    audience: str
    key: Literal["none", "claimed"]


def gather(
    result: EvidenceResult, coverage: CoverageKind, reference: Reference | None, *, differs: bool
) -> tuple[Facts, Entity]:
    """The facts of accepted evidence, and the workload it names.

    Args:
        result: accepted.
        coverage: what measures the agent.
        reference: the relying party's, or ``None``.
        differs: whether the evidence differs from it.

    Raises:
        Misuse: ``NOT_ACCEPTED``: refused evidence shows nothing.
    """
    statement, endorsement = result.statement, result.endorsement
    if not result.accepted or statement is None or endorsement is None:
        raise Misuse("NOT_ACCEPTED", "the evidence was refused: it shows nothing")
    hardware = result.hardware if endorsement.kind in _HARDWARE else None
    listed = reference is not None and reference.instances is not None and is_instance(result, reference.instances)
    facts = Facts(
        **gather_gpus(result).context(),
        endorsement=endorsement.kind,
        simulated=endorsement.simulated,
        platform_freshness="none" if hardware is None else hardware.platform_freshness,
        platform_floor="kept" if _keeps_floor(hardware) else "none-configured",
        instance="pinned" if endorsement.pinned or listed else "any",
        boot_log="none" if result.boot_log is None else "explained",
        secure_boot="unknown" if result.secure_boot is None else result.secure_boot.state,
        debug=_debug(result.boot_log),
        agent_coverage=coverage,
        reference="not-given" if reference is None else "differs" if differs else "match",
        reference_pcrs=frozenset() if reference is None else frozenset(reference.pcrs),
        reference_pins=frozenset() if reference is None else reference.pins,
        lane=statement.lane,
        purpose=statement.purpose,
        key_id="" if statement.release is None else statement.release.key,
        audience=statement.audience,
        key="none" if statement.public_key is None else "claimed",
    )
    return facts, _workload(result)


def _keeps_floor(hardware: PlatformEndorsement | None) -> bool:
    return hardware is not None and (hardware.passed("snp.floor") or hardware.passed("tdx.floor"))


def _debug(log: EventLog | None) -> Literal["on", "off", "unknown"]:
    """Whether firmware measured that it runs in debug mode; by digest, so that no text can hide it."""
    if log is None:
        return "unknown"
    measured = (event for event in log.events if event.measured and event.pcr == _SECURE_BOOT_PCR)
    return "on" if any(event.digest(_BANK) == _DEBUG_MODE for event in measured) else "off"


def _workload(result: EvidenceResult) -> Entity:
    caller: dict[str, Any] = {} if result.statement is None else dict(result.statement.caller)
    unit, container, groups = caller["unit"], caller["container"], caller["groups"]
    strong = caller["identity_strength"] == "pidfd"
    return Entity(
        "CGpu::Workload",
        "caller",
        {
            "uid": caller["uid"],
            "gid": caller["gid"],
            "groups": groups or [],
            "groups_known": groups is not None,
            "has_unit": strong and unit is not None,
            "unit": (unit or "") if strong else "",
            "has_container": strong and container is not None,
            "container": (container or "") if strong else "",
            "cgroup": (caller["cgroup"] or "") if strong else "",
            "exe_at_identify": (caller["exe_at_identify"] or "") if strong else "",
            "identity_strength": caller["identity_strength"],
            "root": strong and caller["uid"] == 0 and container is None,
        },
    )
