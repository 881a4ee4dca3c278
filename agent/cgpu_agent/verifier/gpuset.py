"""Judges all devices of a machine together: each on its own, then that they are distinct, complete and one fabric.

One bad, missing or doubled device refuses the whole. The devices are judged before anything is said of the set, each
from nothing, so that none can lean on another's verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpucase import DeviceEvidence, DeviceFacts, DeviceResult, GpuParty, Result
from cgpu_agent.verifier.verdict import Check, Skip, Step, Steps
from cgpu_agent.wire.gpuinventory import MAX_DEVICES
from cgpu_agent.wire.nvidia import NO_PDI, GpuFields, SwitchFields

_PPCIE_GPUS: Final = 8
_PPCIE_SWITCHES: Final = 4


@dataclass(frozen=True, slots=True)
class SetResult:
    """What the devices together showed.

    Attributes:
        result: ``pass`` if every device and every step of the set passed; ``unverifiable`` if the first device that
            did not pass is so; else ``refused``.
        steps: of the set; each device has its own.
        refusal: the step of the set that refused.
        devices: in the order given.
    """

    result: Result
    steps: tuple[Step, ...]
    refusal: Step | None
    devices: tuple[DeviceResult, ...]

    @property
    def accepted(self) -> bool:
        """Whether the result is ``pass``."""
        return self.result == "pass"


@dataclass(frozen=True, slots=True)
class _Set:
    devices: tuple[DeviceResult, ...]
    expected_gpus: int | None

    @property
    def facts(self) -> list[DeviceFacts]:
        found = [each.facts for each in self.devices if each.facts is not None]
        if len(found) != len(self.devices):
            raise LookupError("a step ran although a device was refused")
        return found

    def gpus(self) -> list[tuple[DeviceFacts, GpuFields]]:
        return [(each, each.fields) for each in self.facts if isinstance(each.fields, GpuFields)]

    def switches(self) -> list[tuple[DeviceFacts, SwitchFields]]:
        return [(each, each.fields) for each in self.facts if isinstance(each.fields, SwitchFields)]


def _judge_present(case: _Set) -> str:
    count = len(case.devices)
    if count == 0:
        raise HostileInput("NO_DEVICES", "no device: nothing was proven")
    return f"{count} devices"


def _judge_each(case: _Set) -> str:
    for number, device in enumerate(case.devices):
        if device.refusal is not None:
            slug = device.refusal.slug or "INTERNAL"
            raise HostileInput(slug, f"device {number}, {device.refusal.id}: {device.refusal.detail}")
        if not device.accepted:
            raise HostileInput("INTERNAL", f"device {number} did not pass")
    return f"{len(case.devices)} devices, each judged on its own"


def _judge_distinct(case: _Set) -> str:
    # The leaf changes with a device's firmware, so one GPU could show two; its boot ROM key and its name do not.
    identities = [facts.identity for facts in case.facts]
    signs = {
        "certificate serial number": [each.ueid for each in identities],
        "leaf key": [each.keys[0].hex() for each in identities],
        "boot ROM key": [each.keys[1].hex() for each in identities],
        "device id": [each.device_id for each in identities],
    }
    for what, values in signs.items():
        value, times = Counter(values).most_common(1)[0]
        if times > 1:
            first, second = [number for number, each in enumerate(values) if each == value][:2]
            raise HostileInput("DUPLICATE_DEVICE", f"devices {first} and {second} are one: same {what}")
    return f"{len(identities)} different devices"


def _judge_count(case: _Set) -> str | Skip:
    found = len(case.gpus())
    if case.expected_gpus is None:
        return Skip("NO_COUNT", f"{found} GPUs; how many there should be was not said")
    if found != case.expected_gpus:
        raise HostileInput("WRONG_COUNT", f"{found} GPUs, {case.expected_gpus} are expected")
    return f"{found} GPUs"


def _judge_one_answer(case: _Set) -> str:
    if len({facts.nonce for facts in case.facts}) != 1:
        raise HostileInput("NONCE_MISMATCH", "the devices answer different nonces: they were not asked together")
    if len({facts.simulated for facts in case.facts}) != 1:
        raise HostileInput("MIXED_ROOTS", "some of the devices are simulated")
    return "one nonce, one kind of root"


def _is_ppcie(fields: GpuFields) -> bool:
    return fields.mode == "ppcie" or fields.protected_pcie is True


def _judge_mode(case: _Set) -> str | Skip:
    modes = {"ppcie" if _is_ppcie(fields) else (fields.mode or "not reported") for _, fields in case.gpus()}
    if not modes:
        return Skip("NO_GPUS", "no GPU among the devices")
    if len(modes) > 1:
        raise HostileInput("MIXED_MODES", f"GPUs of one machine in different modes: {', '.join(sorted(modes))}")
    return modes.pop()


def _judge_topology(case: _Set) -> str | Skip:
    gpus, switches = case.gpus(), case.switches()
    if not any(_is_ppcie(fields) for _, fields in gpus):
        if gpus and switches:
            raise HostileInput("TOPOLOGY", "switches came along with GPUs that are not in protected-PCIe mode")
        return Skip("NOT_APPLICABLE", "no GPU is in protected-PCIe mode")
    if (len(gpus), len(switches)) != (_PPCIE_GPUS, _PPCIE_SWITCHES):
        raise HostileInput(
            "PPCIE_INCOMPLETE",
            f"{len(gpus)} GPUs and {len(switches)} switches; protected PCIe protects the {_PPCIE_GPUS} GPUs and "
            f"{_PPCIE_SWITCHES} switches of a baseboard only together",
        )
    switch_pdis = {_switch_pdi(facts, fields) for facts, fields in switches}
    gpu_pdis = {facts.identity.pdi for facts, _ in gpus}
    for number, (_, fields) in enumerate(gpus):
        # The two kinds write the identifier in opposite byte orders.
        if {pdi[::-1] for pdi in fields.switch_pdis if pdi != NO_PDI} != switch_pdis:
            raise HostileInput("TOPOLOGY", f"GPU {number} is linked to other switches than those that were attested")
    for number, (_, switch) in enumerate(switches):
        if {pdi for pdi in switch.gpu_pdis if pdi != NO_PDI} != gpu_pdis:
            raise HostileInput("TOPOLOGY", f"switch {number} is linked to other GPUs than those that were attested")
    return f"{len(gpus)} GPUs and {len(switches)} switches are linked to one another and to nothing else"


def _switch_pdi(facts: DeviceFacts, fields: SwitchFields) -> bytes | None:
    if fields.pdi is None or fields.pdi != facts.identity.pdi:
        raise HostileInput("TOPOLOGY", "a switch gives itself another identifier than its certificates do")
    return fields.pdi


SET_CHECKS: Final[Sequence[Check[_Set]]] = (
    Check("set.present", "there is at least one device", _judge_present),
    Check("set.devices", "every device passes on its own", _judge_each),
    Check("set.distinct", "no device is there twice", _judge_distinct),
    Check("set.count", "there are as many GPUs as there should be", _judge_count),
    Check("set.one-answer", "they were asked together and are of one kind", _judge_one_answer),
    Check("set.mode", "the GPUs are in one mode", _judge_mode),
    Check("set.topology", "GPUs and switches are one closed fabric", _judge_topology),
)
"""The steps of ``verify_devices``, in order."""


def verify_devices(
    evidence: Sequence[DeviceEvidence], party: GpuParty, *, expected_gpus: int | None = None
) -> SetResult:
    """Judge all devices of a machine by ``SET_CHECKS``.

    Args:
        evidence: one entry a device, GPUs and switches in any order, at most ``MAX_DEVICES``.
        party: who judges; applies to every device.
        expected_gpus: how many GPUs there must be, from a source other than the evidence; ``None`` = any, but one.

    Raises:
        HostileInput: ``TOO_MANY_DEVICES``, before anything is judged.
    """
    if len(evidence) > MAX_DEVICES:
        raise HostileInput("TOO_MANY_DEVICES", f"{len(evidence)} devices, at most {MAX_DEVICES} are judged")
    devices = tuple(verify_device(each, party) for each in evidence)
    steps = Steps()
    accepted = steps.run(SET_CHECKS, _Set(devices, expected_gpus))
    result: Result = "pass" if accepted else "refused"
    bad = next((each for each in devices if not each.accepted), None)
    if bad is not None:
        result = bad.result
    return SetResult(result, steps.all, steps.refusal, devices)
