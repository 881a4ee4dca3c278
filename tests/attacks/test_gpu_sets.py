"""Attacks on a set of devices, one or more for each numbered step; each names the step that must stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier import gpuset as set_module
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpucapability import Architecture
from cgpu_agent.verifier.gpucase import DeviceEvidence, GpuParty
from cgpu_agent.verifier.gpuchain import PinnedRoots
from cgpu_agent.verifier.gpufloor import Floors
from cgpu_agent.verifier.gpureport import set_json, warnings
from cgpu_agent.verifier.gpuset import SET_CHECKS, SetResult, verify_devices
from cgpu_agent.wire.nvidia import Field
from cgpu_agent.wire.spdm import Measurement
from fixtures.gpu import ON, Device, Vendor, measurements
from fixtures.gpujudge import GPU, OTHER, PARTY, SWITCH, VENDOR, Given, fields, of
from fixtures.gpupki import digest


def together(*devices: Device, party: GpuParty = PARTY, expected: int | None = None) -> SetResult:
    return verify_devices([of(each).evidence for each in devices], party, expected_gpus=expected)


def board(**bent: object) -> list[DeviceEvidence]:
    return [DeviceEvidence(each.report(fields=given), each.chain) for each, given in VENDOR.baseboard(**bent)]  # type: ignore[arg-type]


def refused(result: SetResult) -> tuple[str, str | None] | None:
    return None if result.refusal is None else (result.refusal.id, result.refusal.slug)


def same_device_twice() -> SetResult:
    return together(GPU, OTHER, GPU)


def same_device_with_new_firmware() -> SetResult:
    """Another leaf: other serial number, key, ueid and even name. Its boot ROM is the same."""
    other = VENDOR.device().leaf.certificate
    again = GPU.signers[1].issue("GH100 A01 FMC LF", [(each.value, each.critical) for each in other.extensions])
    return together(GPU, Device(GPU.chip, (again, *GPU.signers[1:]), GPU.pdi))


def two_devices_of_one_name() -> SetResult:
    twin = VENDOR.device(name=f"NVIDIA:GH100:{GPU.pdi.hex().upper()}")
    return together(GPU, twin)


def bad() -> Given:
    """A device whose driver is not as published."""
    blocks = measurements()
    blocks[21] = Measurement(22, 1, digest("malware"))
    return of(OTHER, blocks=blocks)


def no_device_at_all() -> SetResult:
    return together()


def one_gpu_hidden() -> SetResult:
    return together(GPU, expected=2)


def a_switch_counted_as_a_gpu() -> SetResult:
    return together(GPU, SWITCH, expected=2)


def one_bad_device_among_good_ones() -> SetResult:
    return verify_devices([of(GPU).evidence, bad().evidence, of(OTHER).evidence], PARTY)


def reports_of_different_moments() -> SetResult:
    """Where no nonce is compared, the devices must still have been asked together."""
    given = [of(GPU).evidence, of(OTHER, nonce=digest("yesterday")[:32]).evidence]
    return verify_devices(given, replace(PARTY, nonce=None))


def gpus_in_two_modes() -> SetResult:
    other = fields(OTHER, FEATURE_FLAG=b"\1\0").evidence
    return verify_devices([of(GPU).evidence, other], PARTY)


def seven_of_eight_gpus() -> SetResult:
    return verify_devices(board()[1:], PARTY)


def baseboard_without_switches() -> SetResult:
    return verify_devices(board()[:8], PARTY)


def switch_of_another_baseboard() -> SetResult:
    return verify_devices([*board()[:-1], board()[-1]], PARTY)


def bent_board(
    number: int, change: Callable[[Device, dict[int, bytes]], tuple[Device, dict[int, bytes]]]
) -> SetResult:
    devices = VENDOR.baseboard()
    devices[number] = change(*devices[number])
    return verify_devices([DeviceEvidence(each.report(fields=given), each.chain) for each, given in devices], PARTY)


def gpu_of_another_baseboard() -> SetResult:
    """Eight attested GPUs and four attested switches, but the switches are linked to one that was not attested."""
    return bent_board(0, lambda _, given: (VENDOR.device(), given))


def switch_that_lies_about_itself() -> SetResult:
    """Every GPU is linked to the switch by the identifier that it gives itself, which is not its own."""
    devices = VENDOR.baseboard()
    own, false = devices[-1][0].pdi, bytes(range(8))

    def lie(value: bytes) -> bytes:
        return value.replace(own, false).replace(own[::-1], false[::-1])

    bent = [(each, {number: lie(value) for number, value in given.items()}) for each, given in devices]
    return verify_devices([DeviceEvidence(each.report(fields=given), each.chain) for each, given in bent], PARTY)


def lone_gpu_in_protected_pcie_mode() -> SetResult:
    """By a driver that reports the mode in one field only."""
    return verify_devices([fields(PROTECTED_PCIE_STATUS=ON, FEATURE_FLAG=None).evidence], PARTY)


def switch_beside_gpus_that_need_none() -> SetResult:
    return together(GPU, SWITCH)


def link_to_an_unattested_switch() -> SetResult:
    def change(gpu: Device, given: dict[int, bytes]) -> tuple[Device, dict[int, bytes]]:
        links = given[Field.SWITCH_PDIS_OR_DEVICE_PDI]
        return gpu, given | {Field.SWITCH_PDIS_OR_DEVICE_PDI: links[:-8] + b"\xee" * 8}

    return bent_board(3, change)


ATTACKS: dict[Callable[[], SetResult], tuple[str, str]] = {
    no_device_at_all: ("set.present", "NO_DEVICES"),
    one_bad_device_among_good_ones: ("set.devices", "MEASUREMENT_MISMATCH"),
    same_device_twice: ("set.distinct", "DUPLICATE_DEVICE"),
    same_device_with_new_firmware: ("set.distinct", "DUPLICATE_DEVICE"),
    two_devices_of_one_name: ("set.distinct", "DUPLICATE_DEVICE"),
    one_gpu_hidden: ("set.count", "WRONG_COUNT"),
    a_switch_counted_as_a_gpu: ("set.count", "WRONG_COUNT"),
    reports_of_different_moments: ("set.one-answer", "NONCE_MISMATCH"),
    gpus_in_two_modes: ("set.mode", "MIXED_MODES"),
    seven_of_eight_gpus: ("set.topology", "PPCIE_INCOMPLETE"),
    lone_gpu_in_protected_pcie_mode: ("set.topology", "PPCIE_INCOMPLETE"),
    switch_beside_gpus_that_need_none: ("set.topology", "TOPOLOGY"),
    baseboard_without_switches: ("set.topology", "PPCIE_INCOMPLETE"),
    switch_of_another_baseboard: ("set.topology", "TOPOLOGY"),
    gpu_of_another_baseboard: ("set.topology", "TOPOLOGY"),
    switch_that_lies_about_itself: ("set.topology", "TOPOLOGY"),
    link_to_an_unattested_switch: ("set.topology", "TOPOLOGY"),
}


def test_the_honest_sets_pass() -> None:
    assert together(GPU, OTHER, expected=2).accepted
    assert verify_devices(board(), PARTY, expected_gpus=8).accepted


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_refuses(attack: Callable[[], SetResult]) -> None:
    result = attack()
    assert refused(result) == ATTACKS[attack]
    assert result.result == "refused"


def test_every_step_has_an_attack_that_it_stops() -> None:
    assert {step for step, _ in ATTACKS.values()} == {check.id for check in SET_CHECKS}


@pytest.mark.parametrize(
    "attack",
    [
        same_device_twice,
        one_gpu_hidden,
        reports_of_different_moments,
        gpus_in_two_modes,
        link_to_an_unattested_switch,
    ],
    ids=lambda attack: attack.__name__,
)
def test_without_its_step_the_set_would_pass(
    attack: Callable[[], SetResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = ATTACKS[attack]
    remaining = tuple(check for check in SET_CHECKS if check.id != step)
    monkeypatch.setattr(set_module, "SET_CHECKS", remaining)
    assert attack().accepted


def test_a_simulated_device_does_not_hide_among_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both roots are trusted, a verdict on the whole must not call a part of it real."""
    software = Vendor()
    (real,) = VENDOR.device_roots.spki
    monkeypatch.setattr("cgpu_agent.verifier.gpucase.NVIDIA_DEVICE_ROOT", real)
    both = replace(PARTY, device_roots=PinnedRoots(VENDOR.device_roots.spki | software.device_roots.spki))
    fake = software.device()
    result = verify_devices([of(GPU).evidence, DeviceEvidence(fake.report(), fake.chain)], both)
    assert refused(result) == ("set.one-answer", "MIXED_ROOTS")


def test_an_ampere_among_good_devices_makes_the_whole_unverifiable() -> None:
    evidence = [of(GPU).evidence, replace(of().evidence, architecture=Architecture.AMPERE)]
    result = verify_devices(evidence, PARTY)
    assert result.result == "unverifiable"
    assert not result.accepted


def test_more_devices_than_any_machine_has_are_refused_unjudged() -> None:
    with pytest.raises(HostileInput) as caught:
        verify_devices([of(GPU).evidence] * 65, PARTY)
    assert caught.value.slug == "TOO_MANY_DEVICES"


def test_a_bad_device_does_not_touch_the_verdict_on_another() -> None:
    alone = of(GPU).judge()
    beside = one_bad_device_among_good_ones().devices
    assert [each.result for each in beside] == ["pass", "refused", "pass"]
    assert beside[0] == alone


def test_whatever_is_not_shown_is_said() -> None:
    bare = replace(PARTY, nonce=None, floors=Floors(), collateral=Collateral(), allow_no_rim=True)
    result = verify_devices([fields(GPU, FWID=None).evidence], bare)
    assert result.accepted
    said = {step.slug: step.detail for step in warnings(result)}
    assert {"NO_NONCE", "NO_FLOOR", "NO_RIM", "REVOCATION_UNKNOWN", "FWID_ABSENT", "NO_COUNT"} <= said.keys()
    assert said["NO_FLOOR"].startswith("floor: none configured")
    shown = set_json(result)
    assert shown["not_covered"] == ["cc-mode", "devtools-mode", "ready-state", "cpu-binding"]


def test_switches_alone_are_no_gpus_and_that_is_said() -> None:
    result = verify_devices([of(SWITCH).evidence], PARTY)
    assert "NO_GPUS" in [step.slug for step in warnings(result)]
    assert refused(verify_devices([of(SWITCH).evidence], PARTY, expected_gpus=1)) == ("set.count", "WRONG_COUNT")
