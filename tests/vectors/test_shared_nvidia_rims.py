"""NVIDIA's public reference values, and claims and policies for their tokens, give the results computed for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.gpuchain import NVIDIA_RIM_ROOT, NVIDIA_RIM_ROOTS, PinnedRoots, spki_digest
from cgpu_agent.verifier.gpueat import eat
from cgpu_agent.verifier.gpuset import verify_devices
from cgpu_agent.verifier.rim import verify_rim
from cgpu_agent.wire.rim import parse_rim
from fixtures.recorded_gpu import (
    DRIVER_RIM,
    GPU_DAY,
    N1,
    SWITCH_DAY,
    SWITCH_RIM,
    UTC,
    VBIOS_RIM,
    device,
    mismatches,
    party,
    refused,
)

WINDOWS = {
    DRIVER_RIM: ("2024-06-01T02:08:29", "2026-06-01T02:08:29"),
    "rims/NV_GPU_DRIVER_GH100_550.144.03.xml": ("2024-12-30T16:56:50", "2026-12-30T16:56:50"),
    VBIOS_RIM: ("2026-01-07T18:39:21", "2028-01-07T18:39:21"),
    SWITCH_RIM: ("2026-05-20T22:02:51", "2027-11-02T23:59:59"),
}


@pytest.fixture
def nvidia(shared_data: Path) -> Path:
    return shared_data / "nvidia"


def test_the_published_rim_root_holds_the_pinned_key(nvidia: Path) -> None:
    (root,) = load_certificates((nvidia / "roots" / "verifier_RIM_root.pem").read_bytes())
    assert spki_digest(root) == NVIDIA_RIM_ROOT


def test_every_genuine_manifest_is_accepted_in_its_time(nvidia: Path) -> None:
    files = sorted((nvidia / "rims").iterdir())
    assert len(files) == 14
    for file in files:
        data = file.read_bytes()
        start = max(each.not_valid_before_utc for each in _certificates(data))
        judged = verify_rim(data, roots=NVIDIA_RIM_ROOTS, at=start)
        assert refused(judged) is None, file.name
        assert judged.verified is not None
        assert len(judged.verified.rim.goldens) == 64
        early = verify_rim(data, roots=NVIDIA_RIM_ROOTS, at=start - timedelta(seconds=1))
        assert refused(early) == ("rim.chain", "CERTIFICATE_NOT_YET_VALID")


def _certificates(data: bytes) -> Sequence[Any]:
    return [load_certificates(each)[0] for each in parse_rim(data).certificates]


@pytest.mark.parametrize("file", WINDOWS)
def test_a_manifest_is_accepted_within_its_window_only(nvidia: Path, file: str) -> None:
    data = (nvidia / file).read_bytes()
    first, last = (datetime.fromisoformat(each).replace(tzinfo=UTC) for each in WINDOWS[file])
    for moment, outcome in (
        (first - timedelta(seconds=1), ("rim.chain", "CERTIFICATE_NOT_YET_VALID")),
        (first, None),
        (last, None),
        (last + timedelta(seconds=1), ("rim.chain", "CERTIFICATE_EXPIRED")),
    ):
        assert refused(verify_rim(data, roots=NVIDIA_RIM_ROOTS, at=moment)) == outcome


def test_active_goldens_are_those_of_the_index(nvidia: Path) -> None:
    for file in sorted((nvidia / "rims").iterdir()):
        rim = parse_rim(file.read_bytes()).claimed
        active = {golden.index for golden in rim.active}
        if rim.edition == "SWITCH":
            assert active == set(range(31))
        else:
            assert active in ({*range(7), *range(8, 13)}, {7, *range(21, 41)})


@pytest.mark.parametrize(
    ("file", "moment", "outcome"),
    [
        ("incorrect_signature_driver_rim.xml", "2026-03-01", ("rim.signature", "BAD_RIM_SIGNATURE")),
        (
            "NV_GPU_DRIVER_GH100_535.86.09_measurement_mismatch.xml",
            "2026-03-01",
            ("rim.digest", "RIM_DIGEST_MISMATCH"),
        ),
        (
            "NV_SWITCH_BIOS_5612_0002_890_9610550001_invalid_signature.xml",
            "2026-03-01",
            ("rim.digest", "RIM_DIGEST_MISMATCH"),
        ),
    ],
)
def test_an_altered_manifest_is_refused_for_its_own_reason(
    nvidia: Path, file: str, moment: str, outcome: tuple[str, str]
) -> None:
    at = datetime.fromisoformat(moment).replace(tzinfo=UTC)
    judged = verify_rim((nvidia / "negative" / file).read_bytes(), roots=NVIDIA_RIM_ROOTS, at=at)
    assert refused(judged) == outcome
    assert judged.passed("rim.chain")


def test_with_checks_off_the_altered_goldens_differ_where_they_were_altered(nvidia: Path) -> None:
    file = "negative/NV_GPU_DRIVER_GH100_535.86.09_measurement_mismatch.xml"
    expected = [7, 21, 22, 25, 26, 27, 29, 30, 31, 32, 34, 37, 39, 40, 41]
    assert mismatches(nvidia, "hopper/sdk-sample", ("driver", file)) == expected


def test_under_a_leaf_as_root_nothing_verifies(nvidia: Path) -> None:
    wrong = PinnedRoots.of(load_certificates((nvidia / "negative" / "incorrect_rim_root.crt").read_bytes()))
    for file in sorted((nvidia / "rims").iterdir()):
        judged = verify_rim(file.read_bytes(), roots=wrong, at=GPU_DAY)
        assert refused(judged) == ("rim.chain", "UNKNOWN_ROOT")


# --- claims and policies ---

CLAIMS = {"hopperClaimsv3_decoded.json": "GPU-0", "switch_decoded.json": "SWITCH-0"}


def our_claims(folder: Path, name: str) -> dict[str, Any]:
    if name == "GPU-0":
        given, judge = device(folder, "hopper/nvtrust-v2.7"), party(folder, DRIVER_RIM, VBIOS_RIM, nonce=N1)
    else:
        given, judge = device(folder, "switch/sdk-switch"), party(folder, SWITCH_RIM, at=SWITCH_DAY, nonce=N1)
    overall, devices = eat(verify_devices([given], judge), judge.at)
    assert isinstance(overall, dict)
    assert isinstance(devices, dict)
    found: dict[str, Any] = devices[name]
    return found


@pytest.mark.parametrize("file", CLAIMS)
def testour_claims_are_those_of_nvidias_token_for_the_same_report(nvidia: Path, file: str) -> None:
    name = CLAIMS[file]
    wanted = json.loads((nvidia / "claims" / file).read_text())[name]
    ours = our_claims(nvidia, name)
    token_only = {"iss", "exp", "iat", "nbf", "jti"}
    differ = {
        key
        for key in wanted.keys() - token_only
        if not isinstance(wanted[key], dict) and ours.get(key) != wanted[key]
    }
    # A switch does not report its FWID: NVIDIA calls that a match. For switches it leaves out the manufacturer.
    assert differ == (
        set() if name == "GPU-0" else {"x-nvidia-switch-attestation-report-cert-chain-fwid-match", "oemid"}
    )
    for key in (key for key in wanted if isinstance(wanted[key], dict)):
        assert ours[key].keys() >= wanted[key].keys()
        assert ours[key]["x-nvidia-cert-status"] == wanted[key]["x-nvidia-cert-status"] == "valid"


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("remote/v4/NVGPURemotePolicyExample.json", "GPU-0"),
        ("local/NVGPULocalv4PolicyExample.json", "GPU-0"),
        ("remote/v4/NVSwitchRemotePolicyExample.json", "SWITCH-0"),
        ("local/NVSwitchLocalv4PolicyExample.json", "SWITCH-0"),
    ],
)
def test_nvidias_policies_lack_only_what_was_not_brought_along(nvidia: Path, policy: str, name: str) -> None:
    rules = json.loads((nvidia / "policies" / policy).read_text())["authorization-rules"]["detached-claims"]
    ours = our_claims(nvidia, name)
    lacking = set()
    for key, value in rules.items():
        if isinstance(value, dict):
            lacking |= {inner for inner, each in value.items() if ours[key][inner] != each}
        elif ours.get(key) != value:
            lacking.add(key)
    absent_fwid = set() if name == "GPU-0" else {"x-nvidia-switch-attestation-report-cert-chain-fwid-match"}
    assert lacking == {"x-nvidia-cert-ocsp-status"} | absent_fwid
