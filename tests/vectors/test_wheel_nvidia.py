"""A real Hopper and real reference values, from NVIDIA's published package; needs only a way to fetch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone

import pytest

from cgpu_agent.verifier.certificate import load_certificate
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpucase import DeviceEvidence, GpuParty
from cgpu_agent.verifier.gpuchain import NVIDIA_DEVICE_ROOT, NVIDIA_RIM_ROOT, NVIDIA_RIM_ROOTS, spki_digest
from cgpu_agent.verifier.rim import verify_rim
from fixtures.nvidiawheel import NotFetched, wheel_data
from fixtures.recorded_gpu import N1, SIGNED_2023, refused

DAY = datetime(2026, 3, 1, tzinfo=timezone.utc)
"""Any day would do for the device, whose certificates end with the year 9999."""
PARTY = GpuParty(at=DAY, nonce=N1, allow_no_rim=True)


@pytest.fixture(scope="module")
def wheel() -> Mapping[str, bytes]:
    try:
        return wheel_data()
    except NotFetched as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def evidence(wheel: Mapping[str, bytes]) -> DeviceEvidence:
    report = bytes.fromhex(wheel["samples/hopperAttestationReport.txt"].decode())
    return DeviceEvidence(report, wheel["samples/hopperCertChain.txt"])


@pytest.fixture(scope="module")
def manifests(wheel: Mapping[str, bytes]) -> Mapping[str, bytes]:
    return {name: data for name, data in wheel.items() if name.endswith(".swidtag")}


def test_the_pinned_roots_are_those_that_nvidia_ships(wheel: Mapping[str, bytes]) -> None:
    roots = [load_certificate(wheel[f"certs/verifier_{name}_root.pem"]) for name in ("device", "RIM")]
    assert [spki_digest(each) for each in roots] == [NVIDIA_DEVICE_ROOT, NVIDIA_RIM_ROOT]


def test_the_real_hopper_is_genuine_and_fresh(evidence: DeviceEvidence) -> None:
    result = verify_device(evidence, PARTY)
    assert refused(result) is None
    facts = result.facts
    assert facts is not None
    assert (facts.driver, facts.vbios) == ("550.90.07", "96.00.9F.00.01")
    assert facts.rim_ids == ("NV_GPU_DRIVER_GH100_550.90.07", "NV_GPU_VBIOS_1010_0200_882_96009F0001")
    assert (facts.identity.hwmodel, facts.identity.device_id) == ("GH100 A01 GSP BROM", "48B02D92494BADF4")
    assert facts.identity.ueid == "478176379286082186618948445787393647364802107249"
    assert result.fwid_matched is True
    assert not facts.simulated


def test_without_its_reference_values_the_real_hopper_does_not_pass(
    evidence: DeviceEvidence, manifests: Mapping[str, bytes]
) -> None:
    assert refused(verify_device(evidence, replace(PARTY, allow_no_rim=False))) == ("gpu.driver-rim", "NO_RIM")
    others = replace(PARTY, collateral=Collateral.load(rims=manifests.values()))
    assert refused(verify_device(evidence, others)) == ("gpu.driver-rim", "NO_RIM")


def test_the_real_hopper_answers_its_own_nonce_only(evidence: DeviceEvidence) -> None:
    for nonce in (bytes(32), N1[::-1]):
        assert refused(verify_device(evidence, replace(PARTY, nonce=nonce))) == ("gpu.nonce", "NONCE_MISMATCH")


@pytest.mark.parametrize("where", [4, 60, 2000, 3700, 4000, -1])
def test_no_bit_of_its_report_may_change(evidence: DeviceEvidence, where: int) -> None:
    changed = bytearray(evidence.report)
    changed[where] ^= 1
    result = verify_device(replace(evidence, report=bytes(changed)), PARTY)
    assert result.result == "refused"
    assert result.facts is None


def test_real_reference_values_verify_while_their_signers_certificate_lasts(manifests: Mapping[str, bytes]) -> None:
    assert len(manifests) == 26
    for data in manifests.values():
        judged = verify_rim(data, roots=NVIDIA_RIM_ROOTS, at=SIGNED_2023)
        assert judged.verified is not None
        assert (judged.verified.rim.product, len(judged.verified.rim.goldens)) == ("GH100", 64)
        assert refused(verify_rim(data, roots=NVIDIA_RIM_ROOTS, at=DAY)) == ("rim.chain", "CERTIFICATE_EXPIRED")


def test_real_reference_values_that_were_altered_do_not_verify(manifests: Mapping[str, bytes]) -> None:
    for data in manifests.values():
        altered = data.replace(b'active="False"', b'active="True"', 1)
        assert altered != data
        judged = verify_rim(altered, roots=NVIDIA_RIM_ROOTS, at=SIGNED_2023)
        assert refused(judged) == ("rim.digest", "RIM_DIGEST_MISMATCH")
