"""The verdict in NVIDIA's claims: their names, true only for what passed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509

from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpucase import DeviceEvidence, GpuParty
from cgpu_agent.verifier.gpueat import eat
from cgpu_agent.verifier.gpufloor import Floors
from cgpu_agent.verifier.gpuset import verify_devices
from cgpu_agent.wire import strictjson
from fixtures.gpu import DRIVER, NONCE, SWITCH_BIOS, VBIOS
from fixtures.gpujudge import GPU, OTHER, PARTY, RIMS, SWITCH, VENDOR, Given, fields, of
from fixtures.gpupki import Signer
from fixtures.gpurevocation import crl, ocsp_response
from fixtures.pki import NOW

GPU_POLICY: dict[str, Any] = {
    "measres": "success",
    "x-nvidia-gpu-arch-check": True,
    "x-nvidia-gpu-attestation-report-parsed": True,
    "x-nvidia-gpu-attestation-report-nonce-match": True,
    "x-nvidia-gpu-attestation-report-signature-verified": True,
    "x-nvidia-gpu-attestation-report-cert-chain": {
        "x-nvidia-cert-status": "valid",
        "x-nvidia-cert-ocsp-status": "good",
    },
    "x-nvidia-gpu-attestation-report-cert-chain-fwid-match": True,
    "x-nvidia-gpu-driver-rim-fetched": True,
    "x-nvidia-gpu-driver-rim-schema-validated": True,
    "x-nvidia-gpu-driver-rim-signature-verified": True,
    "x-nvidia-gpu-driver-rim-version-match": True,
    "x-nvidia-gpu-driver-rim-cert-chain": {"x-nvidia-cert-status": "valid", "x-nvidia-cert-ocsp-status": "good"},
    "x-nvidia-gpu-driver-rim-measurements-available": True,
    "x-nvidia-gpu-vbios-rim-fetched": True,
    "x-nvidia-gpu-vbios-rim-schema-validated": True,
    "x-nvidia-gpu-vbios-rim-signature-verified": True,
    "x-nvidia-gpu-vbios-rim-version-match": True,
    "x-nvidia-gpu-vbios-rim-cert-chain": {"x-nvidia-cert-status": "valid", "x-nvidia-cert-ocsp-status": "good"},
    "x-nvidia-gpu-vbios-rim-measurements-available": True,
    "x-nvidia-gpu-vbios-index-no-conflict": True,
}
"""What a policy of version 4.0 asks of a GPU: each key there, and equal."""


def answers() -> list[bytes]:
    """OCSP responses about every certificate that is checked."""
    pairs = list(zip(GPU.signers[1:4], GPU.signers[2:], strict=True))
    l3, ca, root = VENDOR.rim_chain
    found = [ocsp_response(child.certificate, issuer) for child, issuer in pairs]
    found += [ocsp_response(l3.certificate, ca), ocsp_response(ca.certificate, root)]
    for document in RIMS.rims:
        found.append(ocsp_response(x509.load_der_x509_certificate(document.certificates[0]), l3))
    return found


CHECKED = replace(PARTY, collateral=Collateral.load(rims=[each.data for each in RIMS.rims], ocsp=answers()))


def claims(*given: Given, party: GpuParty = PARTY) -> tuple[dict[str, Any], dict[str, Any]]:
    overall, devices = eat(verify_devices([each.evidence for each in given], party), NOW)
    assert isinstance(overall, dict)
    assert isinstance(devices, dict)
    return overall, devices


def unmet(policy: dict[str, Any], found: dict[str, Any]) -> set[str]:
    """Keys of a policy that the claims do not meet, nested ones too."""
    missed = set()
    for key, wanted in policy.items():
        there = found.get(key)
        if isinstance(wanted, dict):
            missed |= {f"{key}/{each}" for each in unmet(wanted, there or {})}
        elif there != wanted or type(there) is not type(wanted):
            missed.add(key)
    return missed


def test_a_fully_checked_gpu_meets_a_policy_for_nvidias_tokens() -> None:
    overall, devices = claims(of(), party=CHECKED)
    assert unmet(GPU_POLICY, devices["GPU-0"]) == set()
    assert overall["x-nvidia-overall-att-result"] is True
    assert overall["x-nvidia-ver"] == "3.0"


def test_identity_claims_are_nvidias() -> None:
    overall, devices = claims(of(), of(SWITCH))
    gpu, switch = devices["GPU-0"], devices["SWITCH-0"]
    assert gpu["ueid"] == str(GPU.leaf.certificate.serial_number)
    assert (gpu["hwmodel"], gpu["oemid"], gpu["eat_nonce"]) == ("GH100 A01 BROM", "5703", NONCE.hex())
    assert (gpu["x-nvidia-gpu-driver-version"], gpu["x-nvidia-gpu-vbios-version"]) == (DRIVER, VBIOS)
    assert switch["x-nvidia-switch-bios-version"] == SWITCH_BIOS
    assert switch["x-nvidia-switch-bios-rim-measurements-available"] is True
    assert overall["x-nvidia-overall-att-result"] is False  # a switch beside GPUs that are not in protected-PCIe mode
    assert {name.split("-")[0] for name in devices} == {"GPU", "SWITCH"}


def test_digests_bind_the_devices_to_the_whole() -> None:
    overall, devices = claims(of(), of(OTHER))
    assert list(devices) == ["GPU-0", "GPU-1"]
    for name, (kind, (algorithm, digest)) in overall["submods"].items():
        assert (kind, algorithm) == ("DIGEST", "SHA-256")
        assert digest == hashlib.sha256(strictjson.dumps(devices[name])).hexdigest()


def test_it_does_not_pretend_to_be_nvidia_and_expires() -> None:
    overall, devices = claims(of())
    for each in (overall, devices["GPU-0"]):
        assert each["iss"] == "cgpu-verifier"
        assert each["exp"] - each["iat"] == 3600
    assert overall["x-cgpu-not-covered"] == ["cc-mode", "devtools-mode", "ready-state", "cpu-binding"]
    assert devices["GPU-0"]["x-cgpu-simulated"] is True


def test_an_unknown_revocation_status_is_not_called_good() -> None:
    _, devices = claims(of())
    chains = {
        f"x-nvidia-gpu-{name}-cert-chain/x-nvidia-cert-ocsp-status"
        for name in ("attestation-report", "driver-rim", "vbios-rim")
    }
    assert unmet(GPU_POLICY, devices["GPU-0"]) == chains


def test_a_crl_is_not_called_ocsp() -> None:
    l3, ca, root = VENDOR.rim_chain
    papers = [crl(each) for each in (*GPU.signers[2:], l3, ca, root)]
    collateral = Collateral.load(rims=[each.data for each in RIMS.rims], crls=papers)
    _, devices = claims(of(), party=replace(PARTY, collateral=collateral, require_revocation=True))
    found = devices["GPU-0"]["x-nvidia-gpu-attestation-report-cert-chain"]
    assert found["x-nvidia-cert-ocsp-status"] == "unknown"
    assert found["x-cgpu-revocation-checked"] is True


def test_a_revoked_certificate_is_said_to_be() -> None:
    boot_rom: Signer = GPU.signers[1]
    paper = crl(GPU.signers[2], boot_rom.certificate, reason=x509.ReasonFlags.key_compromise)
    overall, devices = claims(of(), party=replace(PARTY, collateral=Collateral.load(crls=[paper])))
    found = devices["GPU-0"]["x-nvidia-gpu-attestation-report-cert-chain"]
    assert found["x-nvidia-cert-status"] == "revoked"
    assert found["x-nvidia-cert-revocation-reason"] == "key_compromise"
    assert overall["x-nvidia-overall-att-result"] is False


@pytest.mark.parametrize(
    ("given", "party", "missed"),
    [
        (of(nonce=bytes(32)), CHECKED, "x-nvidia-gpu-attestation-report-nonce-match"),
        (fields(FWID=None), CHECKED, "x-nvidia-gpu-attestation-report-cert-chain-fwid-match"),
        (fields(FWID=bytes(48)), CHECKED, "x-nvidia-gpu-attestation-report-cert-chain-fwid-match"),
        (of(blocks=[]), CHECKED, "measres"),
        (of(), replace(CHECKED, collateral=Collateral(), allow_no_rim=True), "x-nvidia-gpu-driver-rim-fetched"),
        (of(), replace(CHECKED, floors=Floors(driver="999.0")), "measres"),
        (Given(DeviceEvidence(b"", GPU.chain)), CHECKED, "x-nvidia-gpu-attestation-report-parsed"),
        (Given(DeviceEvidence(GPU.report(), b"")), CHECKED, "x-nvidia-gpu-arch-check"),
    ],
)
def test_a_claim_is_true_only_where_its_step_passed(given: Given, party: GpuParty, missed: str) -> None:
    _, devices = claims(given, party=party)
    assert missed in unmet(GPU_POLICY, devices["GPU-0"])
    if devices["GPU-0"]["measres"] != "success":
        assert "secboot" not in devices["GPU-0"]


def test_without_reference_values_nothing_is_measured_and_nothing_has_failed() -> None:
    _, devices = claims(of(), party=replace(PARTY, collateral=Collateral(), allow_no_rim=True))
    assert devices["GPU-0"]["measres"] == "not-run"
