"""What a verdict hands on of each part: claims that signatures and digests prove, apart from the agent's own words.

Whoever reads a verdict must not have to know which field came from whom, so the two never share an object. The
agent's words carry what measures the agent: with ``nothing``, they have no more weight than a stranger's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.verifier.coverage import Coverage
from cgpu_agent.verifier.endorsement import Endorsement
from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.verifier.facts import Facts
from cgpu_agent.verifier.gpufacts import gpu_claims
from cgpu_agent.wire.manifest import Manifest
from cgpu_agent.wire.statement import Statement


@dataclass(frozen=True, slots=True)
class Claims:
    """Claims of one part, as JSON values. Digests and keys are lower-case hex.

    Attributes:
        signed: proved by the quote, the endorsement or a replayed log.
        reported: stated by the agent, with ``measured_by`` among them; empty where it states nothing.
    """

    signed: Mapping[str, Any]
    reported: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Case:
    result: EvidenceResult
    facts: Facts
    coverage: Coverage
    statement: Statement
    manifest: Manifest
    endorsement: Endorsement


def claims_of(part: str, result: EvidenceResult, facts: Facts | None, coverage: Coverage | None) -> Claims:
    """The claims of one part; none when the evidence was refused, or when the part was not asked for."""
    if (
        facts is None
        or coverage is None
        or result.statement is None
        or result.manifest is None
        or result.endorsement is None
        or part not in _MAKERS
    ):
        return Claims({}, {})
    case = _Case(result, facts, coverage, result.statement, result.manifest, result.endorsement)
    found = _MAKERS[part](case)
    if not found.reported:
        return found
    return Claims(found.signed, {**found.reported, "measured_by": coverage.kind})


def _platform(case: _Case) -> Claims:
    endorsement = case.endorsement
    path, hardware = endorsement.path, case.result.hardware
    return Claims(
        {
            "ak_name": None if endorsement.ak_name is None else endorsement.ak_name.hex(),
            "ek_class": endorsement.ek_class,
            "endorsed_by": None if path is None else path.certificates[-1].subject,
            "endorsement": endorsement.kind,
            "hardware": {} if hardware is None else hardware.facts.to_json(),
            "platform_freshness": case.facts.platform_freshness,
            "instance": case.facts.instance,
            "reset_count": case.manifest.reset_count,
            "restart_count": case.manifest.restart_count,
            "simulated": endorsement.simulated,
        },
        {},
    )


def _boot(case: _Case) -> Claims:
    state = case.result.secure_boot
    used = () if state is None else state.authorities
    return Claims(
        {
            "authorities": [each.certificate.sha256 for each in used if each.proven and each.certificate is not None],
            "boot_log": case.facts.boot_log,
            "debug": case.facts.debug,
            "pcrs": {
                str(index): found.actual.hex()
                for index, found in sorted(case.result.registers.items())
                if found.actual is not None
            },
            "reference": case.facts.reference,
            "secure_boot": case.facts.secure_boot,
        },
        {},
    )


def _agent(case: _Case) -> Claims:
    manifest = case.manifest
    return Claims(
        {
            "agent_ak_name": manifest.agent_ak_name.hex(),
            "measured_by": case.coverage.kind,
            "register": manifest.register,
            "root_hash": case.coverage.root_hash,
        },
        {
            **manifest.agent,
            "boot_id": case.statement.boot_id,
            "missing": [{"part": part, "reason": reason} for part, reason in manifest.missing],
            "time": case.statement.time,
            "vm_generation": manifest.vm_generation,
        },
    )


def _workload(case: _Case) -> Claims:
    statement = case.statement
    key = statement.public_key
    return Claims(
        {},
        {
            "audience": statement.audience,
            "caller": dict(statement.caller),
            "key_sha256": None if key is None else hashlib.sha256(key).hexdigest(),
            "purpose": statement.purpose,
            "release": None if statement.release is None else statement.release.to_json(),
            "user_data": None if statement.user_data is None else statement.user_data.hex(),
        },
    )


def _gpus(case: _Case) -> Claims:
    judged, inventory = case.result.gpus, case.manifest.gpus
    if judged is None or inventory is None:
        return Claims({}, {})
    facts = case.facts
    signed = {
        "devices": [gpu_claims(each) for each in judged.devices],
        "floor": facts.gpu_floor,
        "measurements": facts.gpu_measurements,
        "revocation": facts.gpu_revocation,
        "simulated": facts.gpu_simulated,
    }
    return Claims(signed, inventory.to_json())


_MAKERS: Final[Mapping[str, Callable[[_Case], Claims]]] = {
    "agent": _agent,
    "boot": _boot,
    "gpus": _gpus,
    "platform": _platform,
    "workload": _workload,
}
