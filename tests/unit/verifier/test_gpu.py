"""One device judged: each generation passes as itself, and the verdict says what it is worth."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from cgpu_agent.errors import Misuse
from cgpu_agent.verifier import gpuchain
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpucapability import Architecture, architecture_of, capabilities_of
from cgpu_agent.verifier.gpucase import DeviceEvidence, GpuParty
from cgpu_agent.verifier.gpuchain import PinnedRoots
from cgpu_agent.verifier.gpufloor import Floors
from cgpu_agent.verifier.gpureport import device_json
from fixtures.gpu import DRIVER, FWID, NONCE, OFF, SWITCH_BIOS, VBIOS
from fixtures.gpujudge import GPU, PARTY, SWITCH, VENDOR, fields, of
from fixtures.pki import NOW

GENERATIONS = {
    "GH100": (Architecture.HOPPER, f"NV_GPU_DRIVER_GH100_{DRIVER}", "NV_GPU_VBIOS_1010_0200_882_96009F0001"),
    "GB100": (Architecture.BLACKWELL, f"NV_GPU_CC_DRIVER_GB100_{DRIVER}", "NV_GPU_VBIOS_1010_0200_882_97009F0001"),
    "GB20X": (Architecture.BLACKWELL, f"NV_GPU_CC_DRIVER_GB202_{DRIVER}", "NV_GPU_VBIOS_1010_0200_882_97009F0001"),
    "LS_10": (Architecture.LS10, "NV_SWITCH_BIOS_5612_0002_890_9610550001"),
}


def party_for(chip: str) -> GpuParty:
    return replace(PARTY, collateral=Collateral.load(rims=VENDOR.rims(chip)), floors=Floors())


@pytest.mark.parametrize("chip", GENERATIONS)
def test_accepts_a_device_of_each_generation(chip: str) -> None:
    architecture, *rim_ids = GENERATIONS[chip]
    device = VENDOR.device(chip)
    result = verify_device(DeviceEvidence(device.report(), device.chain), party_for(chip))
    assert result.refusal is None
    assert result.result == "pass"
    facts = result.facts
    assert facts is not None
    assert facts.architecture is architecture
    assert list(facts.rim_ids) == rim_ids
    assert facts.identity.ueid == str(device.leaf.certificate.serial_number)
    assert facts.identity.hwmodel == f"{chip} A01 BROM"
    assert facts.identity.pdi == device.pdi
    assert facts.nonce == NONCE
    assert result.fwid_matched is (None if device.is_switch else True)


def test_states_versions_and_measurements() -> None:
    shown = device_json(of().judge())
    assert (shown["driver"], shown["vbios"], shown["mode"], shown["kind"]) == (DRIVER, VBIOS, "spt", "gpu")
    assert shown["measurements"] == {"compared": 32, "mismatched": [], "skipped": [35]}
    assert shown["fwid_matched"] is True
    switch = device_json(of(SWITCH).judge())
    assert (switch["driver"], switch["vbios"], switch["kind"]) == (None, SWITCH_BIOS, "switch")
    assert switch["measurements"] == {"compared": 31, "mismatched": [], "skipped": []}
    assert switch["capabilities"] is None


def test_a_skipped_comparison_is_no_pass_of_that_step() -> None:
    result = verify_device(of().evidence, replace(PARTY, collateral=Collateral(), allow_no_rim=True, nonce=None))
    assert result.accepted
    assert not result.passed("gpu.measurements")
    assert not result.passed("gpu.nonce")
    assert result.comparison is None


def test_firmware_that_does_not_report_its_fwid_is_said_to() -> None:
    result = fields(FWID=None).judge()
    assert result.accepted
    assert result.fwid_matched is None
    assert not result.passed("gpu.fwid")


def test_a_driver_that_reports_no_mode_is_accepted_and_said() -> None:
    result = fields(PROTECTED_PCIE_STATUS=None, FEATURE_FLAG=None).judge()
    assert result.accepted
    assert not result.passed("gpu.mode")
    assert fields(PROTECTED_PCIE_STATUS=OFF, FEATURE_FLAG=None).judge().passed("gpu.mode")


def test_below_nvidias_root_a_device_is_not_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    (pin,) = VENDOR.device_roots.spki
    monkeypatch.setattr("cgpu_agent.verifier.gpucase.NVIDIA_DEVICE_ROOT", pin)
    measured = of().judge()
    assert measured.facts is not None
    assert not measured.facts.simulated
    assert measured.capabilities == capabilities_of(Architecture.HOPPER, simulated=False, measured=True)
    unmeasured = verify_device(of().evidence, replace(PARTY, collateral=Collateral(), allow_no_rim=True))
    assert unmeasured.capabilities is not None
    assert unmeasured.capabilities.code_intact == "not-shown"
    assert unmeasured.capabilities.data_confidential == "not-shown"


def test_the_capability_table_is_that_of_the_documentation() -> None:
    def row(architecture: Architecture) -> list[str]:
        found = capabilities_of(architecture, simulated=False, measured=True)
        assert found is not None
        return list(found.to_json().values())

    assert row(Architecture.AMPERE) == ["yes", "no", "no", "no", "no"]
    assert row(Architecture.HOPPER) == ["yes", "yes", "yes", "yes", "no"]
    assert row(Architecture.BLACKWELL) == ["yes", "yes", "yes", "yes", "not-shown"]
    assert capabilities_of(Architecture.LS10, simulated=False, measured=True) is None


@pytest.mark.parametrize(
    ("chip", "architecture"),
    [("GH100", "hopper"), ("GB100", "blackwell"), ("GB202", "blackwell"), ("GB20X", "blackwell"), ("LS_10", "ls10")],
)
def test_knows_the_generation_of_a_chip(chip: str, architecture: str) -> None:
    assert architecture_of(chip) is Architecture(architecture)


def test_the_moment_of_judgement_decides_about_reference_values() -> None:
    assert of().judge().accepted
    late = verify_device(of().evidence, replace(PARTY, at=NOW + timedelta(days=364, hours=23)))
    assert late.accepted
    early = verify_device(of().evidence, replace(PARTY, at=NOW - timedelta(days=366)))
    assert early.refusal is not None
    assert early.refusal.slug == "CERTIFICATE_NOT_YET_VALID"


def test_a_nonce_is_32_bytes_and_a_moment_has_a_time_zone() -> None:
    for nonce in (b"", NONCE[:31], NONCE + b"\0"):
        with pytest.raises(Misuse) as caught:
            GpuParty(at=NOW, nonce=nonce)
        assert caught.value.slug == "BAD_NONCE"
    with pytest.raises(Misuse) as caught:
        GpuParty(at=datetime(2026, 6, 1))  # noqa: DTZ001 - what is refused
    assert caught.value.slug == "NAIVE_TIME"
    with pytest.raises(Misuse) as caught:
        PinnedRoots(frozenset())
    assert caught.value.slug == "NO_ROOTS"


def test_without_configuration_nvidias_roots_are_trusted_and_no_others() -> None:
    party = GpuParty(at=NOW)
    assert party.device_roots.spki == {gpuchain.NVIDIA_DEVICE_ROOT}
    assert party.rim_roots.spki == {gpuchain.NVIDIA_RIM_ROOT}
    refusal = verify_device(of().evidence, party).refusal
    assert refusal is not None
    assert refusal.slug == "UNKNOWN_ROOT"


def test_the_reported_fwid_is_compared_and_not_another() -> None:
    other = VENDOR.device(fwid=bytes(48))
    assert other.fields()[20] == FWID
    refusal = of(other).judge().refusal
    assert refusal is not None
    assert refusal.slug == "FWID_MISMATCH"


@pytest.mark.parametrize("version", ["550", "x.1", "1.2.3.4.5", "550.-1", "²50.1"])
def test_refuses_a_floor_that_is_no_version(version: str) -> None:
    with pytest.raises(Misuse) as caught:
        Floors(driver=version)
    assert caught.value.slug == "BAD_FLOOR"


@pytest.mark.parametrize("version", ["96", "96.00.9F.00", "96.00.9F.00.0", "96.00.9F.00.0G", "9600.9F.00.01.01"])
def test_refuses_a_firmware_floor_that_is_no_version(version: str) -> None:
    with pytest.raises(Misuse) as caught:
        Floors(vbios=version)
    assert caught.value.slug == "BAD_FLOOR"


@pytest.mark.parametrize(
    ("floor", "enough"), [("550.90.07", True), ("550.90", True), ("550.90.07.1", False), ("99.9", True)]
)
def test_driver_floors_compare_by_number(floor: str, enough: bool) -> None:
    assert verify_device(of(GPU).evidence, replace(PARTY, floors=Floors(driver=floor))).accepted is enough
