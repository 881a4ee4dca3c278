"""What the GPUs of accepted evidence show, and what the agent says of them, in the words an appraisal policy tests.

Modes are the driver's word, handed on by the agent: no signature of NVIDIA's covers them. So a mode of several
devices is the worst one's, and what the driver cannot tell is ``unknown``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.wire.gpuinventory import GpuInventory

if TYPE_CHECKING:  # who judges no GPUs needs no packages for it
    from cgpu_agent.verifier.gpucase import DeviceResult

Switch = Literal["on", "off", "unknown"]


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """The claims about GPUs in ``cedar/appraisal.cedarschema``, which says what each value means."""

    gpus: Literal["not-asked", "verified"] = "not-asked"
    gpu_count: int = 0
    gpu_simulated: bool = False
    gpu_architectures: frozenset[str] = frozenset()
    gpu_measurements: Literal["match", "not-compared"] = "not-compared"
    gpu_revocation: Literal["checked", "unknown"] = "unknown"
    gpu_floor: Literal["kept", "none-configured"] = "none-configured"
    gpu_cc: Switch = "unknown"
    gpu_production: Literal["yes", "no", "unknown"] = "unknown"
    gpu_dev_tools: Switch = "unknown"
    gpu_ready: bool = False

    def context(self) -> dict[str, Any]:
        """As Cedar gets it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def gather_gpus(result: EvidenceResult) -> GpuFacts:
    """The facts of accepted evidence."""
    devices = () if result.gpus is None else result.gpus.devices
    inventory = None if result.manifest is None else result.manifest.gpus
    if not devices or inventory is None:
        return GpuFacts()

    def all_passed(step: str) -> bool:
        return all(device.passed(step) for device in devices)

    return GpuFacts(
        gpus="verified",
        gpu_count=len(devices),
        gpu_simulated=result.simulated_gpus,
        gpu_architectures=frozenset(
            device.facts.architecture.value for device in devices if device.facts is not None
        ),
        gpu_measurements="match" if all_passed("gpu.measurements") else "not-compared",
        gpu_revocation="checked" if all_passed("gpu.revocation") and all_passed("gpu.rim-revocation") else "unknown",
        gpu_floor="kept" if all_passed("gpu.floor") else "none-configured",
        gpu_cc=_switch([record.cc for record in inventory.devices], bad=False),
        gpu_production=_production(inventory),
        gpu_dev_tools=_switch([record.dev_tools for record in inventory.devices], bad=True),
        gpu_ready=inventory.ready and all(record.trusted for record in inventory.devices),
    )


def _switch(values: Iterable[bool | None], *, bad: bool) -> Switch:
    """The worst of several: one bad is bad, else one that is not known makes it unknown."""
    found = set(values)
    if bad in found:
        return "on" if bad else "off"
    if None in found:
        return "unknown"
    return "off" if bad else "on"


def _production(inventory: GpuInventory) -> Literal["yes", "no", "unknown"]:
    found = {record.cc_environment for record in inventory.devices}
    if found == {"prod"}:
        return "yes"
    return "unknown" if found <= {"prod", None} else "no"


def gpu_claims(device: DeviceResult) -> dict[str, Any]:
    """What one device proved, as JSON values."""
    facts = device.facts
    if facts is None or not device.accepted:
        return {}
    return {
        "architecture": facts.architecture.value,
        "capabilities": None if device.capabilities is None else device.capabilities.to_json(),
        "device_id": facts.identity.device_id,
        "driver": facts.driver,
        "fwid_matched": device.fwid_matched,
        "hwmodel": facts.identity.hwmodel,
        "ueid": facts.identity.ueid,
        "vbios": facts.vbios,
    }
