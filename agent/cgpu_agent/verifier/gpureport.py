"""The verdict on GPUs as JSON: what was signed, what it is worth, and what it does not show."""

from __future__ import annotations

from cgpu_agent.verifier.gpucapability import NOT_COVERED
from cgpu_agent.verifier.gpucase import DeviceFacts, DeviceResult
from cgpu_agent.verifier.gpuset import SetResult
from cgpu_agent.verifier.verdict import Outcome, Step
from cgpu_agent.wire.nvidia import GpuFields

_NO_DOUBT = frozenset({"NOT_APPLICABLE", "AFTER_REFUSAL"})


def set_json(result: SetResult) -> dict[str, object]:
    """The verdict on a set of devices."""
    return {
        "devices": [device_json(each) for each in result.devices],
        "not_covered": [word for word, _ in NOT_COVERED],
        "reason": _reason(result.refusal),
        "result": result.result,
        "steps": [step.to_json() for step in result.steps],
        "warnings": [step.slug for step in warnings(result)],
    }


def device_json(device: DeviceResult) -> dict[str, object]:
    """The verdict on one device. Facts stand here only if the device signed them, be it refused later or not."""
    facts = device.facts
    return {
        "capabilities": None if device.capabilities is None else device.capabilities.to_json(),
        "fwid_matched": device.fwid_matched,
        "measurements": None if device.comparison is None else device.comparison.to_json(),
        "reason": _reason(device.refusal),
        "result": device.result,
        "revocation": {name: [each.to_json() for each in found] for name, found in device.revocation.items()},
        "rims": {source: judged.to_json() for source, judged in device.rims.items()},
        "steps": [step.to_json() for step in device.steps],
        **_facts_json(facts),
    }


def _facts_json(facts: DeviceFacts | None) -> dict[str, object]:
    if facts is None:
        names = ("architecture", "chain", "chip", "device_id", "driver", "hwmodel", "kind", "mode")
        return dict.fromkeys((*names, "nonce", "rim_ids", "simulated", "ueid", "unknown_fields", "vbios"))
    return {
        "architecture": facts.architecture.value,
        "chain": facts.path.path.to_json(),
        "chip": facts.identity.chip,
        "device_id": facts.identity.device_id,
        "driver": facts.driver,
        "hwmodel": facts.identity.hwmodel,
        "kind": "switch" if facts.architecture.is_switch else "gpu",
        "mode": facts.fields.mode if isinstance(facts.fields, GpuFields) else None,
        "nonce": facts.nonce.hex(),
        "rim_ids": list(facts.rim_ids),
        "simulated": facts.simulated,
        "ueid": facts.identity.ueid,
        "unknown_fields": sorted(facts.fields.unknown),
        "vbios": facts.vbios,
    }


def _reason(refusal: Step | None) -> dict[str, object] | None:
    return None if refusal is None else {"detail": refusal.detail, "slug": refusal.slug, "step": refusal.id}


def warnings(result: SetResult) -> list[Step]:
    """Skipped steps that leave a doubt, the first of each reason: what an accepted verdict does not rest on."""
    found: dict[str, Step] = {}
    steps = [step for device in result.devices for step in device.steps]
    for step in [*result.steps, *steps]:
        if step.outcome is Outcome.SKIP and step.slug is not None and step.slug not in _NO_DOUBT:
            found.setdefault(step.slug, step)
    return list(found.values())
