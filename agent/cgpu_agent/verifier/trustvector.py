"""The facts once more as a trustworthiness vector, the eight numbers that relying parties of other attesters know.

Source: draft-ietf-rats-ar4si, "Specific Claims": 0 asserts nothing, 2-31 affirm, 32-95 warn, 96-127 contraindicate.
The vector says what evidence shows of a part; its status is the policy's, which may be of another opinion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cgpu_agent.verifier.facts import Facts

CLAIMS: Final = (
    "configuration",
    "executables",
    "file-system",
    "hardware",
    "instance-identity",
    "runtime-opaque",
    "sourced-data",
    "storage-opaque",
)

_RECOGNISED_INSTANCE: Final = 2
_GENUINE_HARDWARE: Final = 2
_CONTRAINDICATED_HARDWARE: Final = 96
_UNRECOGNISED_HARDWARE: Final = 97
_APPROVED_CONFIGURATION: Final = 2
_UNAVAILABLE_CONFIGURATION: Final = 36
_UNSUPPORTABLE_CONFIGURATION: Final = 96
_APPROVED_BOOT: Final = 3
_UNRECOGNISED_EXECUTABLES: Final = 33
_APPROVED_FILES: Final = 2
_VALIDATION_FAILED: Final = 99
_GENUINE: Final = frozenset({"amd-sev-snp", "intel-tdx", "azure-trusted-launch", "ak-certificate", "tpm-vendor-ek"})
_BOOT_PCRS: Final = frozenset({0, 4, 7})


def vector(part: str, facts: Facts | None) -> Mapping[str, int]:
    """The vector of one part: every claim of AR4SI, 0 where nothing is asserted.

    Args:
        part: name of a part.
        facts: of the evidence; ``None`` when it was refused, which says of everything that validation failed.
    """
    if facts is None:
        return dict.fromkeys(CLAIMS, _VALIDATION_FAILED)
    makers = {"gpus": _gpus, "platform": _platform}
    if not facts.simulated:  # what a simulator's owner made up says nothing of a boot, nor of files
        makers |= {"agent": _agent, "boot": _boot}
    asserted = makers[part](facts) if part in makers else {}
    return {claim: asserted.get(claim, 0) for claim in CLAIMS}


def _platform(facts: Facts) -> dict[str, int]:
    hardware = _UNRECOGNISED_HARDWARE
    if facts.simulated:
        hardware = _CONTRAINDICATED_HARDWARE
    elif facts.endorsement in _GENUINE:
        hardware = _GENUINE_HARDWARE
    elif facts.endorsement in ("pinned", "operator-ek"):
        hardware = 0
    return {"hardware": hardware, "instance-identity": _RECOGNISED_INSTANCE if facts.instance == "pinned" else 0}


def _boot(facts: Facts) -> dict[str, int]:
    expected = facts.reference == "match" and facts.reference_pcrs >= _BOOT_PCRS
    configuration = _UNAVAILABLE_CONFIGURATION
    if facts.secure_boot == "disabled" or facts.debug == "on":
        configuration = _UNSUPPORTABLE_CONFIGURATION
    elif facts.secure_boot == "enabled" and expected:
        configuration = _APPROVED_CONFIGURATION
    return {"configuration": configuration, "executables": _APPROVED_BOOT if expected else _UNRECOGNISED_EXECUTABLES}


def _gpus(facts: Facts) -> dict[str, int]:
    if facts.gpus != "verified":
        return {}
    if facts.gpu_simulated:
        return {"hardware": _CONTRAINDICATED_HARDWARE}
    expected = facts.gpu_measurements == "match"
    return {
        "hardware": _GENUINE_HARDWARE,
        "executables": _APPROVED_BOOT if expected else _UNRECOGNISED_EXECUTABLES,
    }


def _agent(facts: Facts) -> dict[str, int]:
    expected = facts.reference == "match" and "command-line" in facts.reference_pins
    if facts.agent_coverage == "verity-root" and expected:
        return {"file-system": _APPROVED_FILES}
    return {"executables": _UNRECOGNISED_EXECUTABLES}
