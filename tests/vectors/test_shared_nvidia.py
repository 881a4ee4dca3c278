"""NVIDIA's public reports give the results that were computed for them independently."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpucase import DeviceEvidence, DeviceResult
from cgpu_agent.verifier.gpuchain import (
    NVIDIA_DEVICE_ROOT,
    NVIDIA_DEVICE_ROOTS,
    NVIDIA_RIM_ROOTS,
    spki_digest,
    verify_pinned_chain,
)
from cgpu_agent.verifier.gpumeasure import Source, compare
from cgpu_agent.verifier.gpuset import verify_devices
from cgpu_agent.verifier.rim import verify_rim
from cgpu_agent.wire.gpuevidence import encode_evidence, parse_evidence
from cgpu_agent.wire.nvidia import parse_gpu, parse_switch
from cgpu_agent.wire.rim import parse_rim
from cgpu_agent.wire.spdm import parse_report
from fixtures.recorded_gpu import (
    COCO,
    DRIVER_RIM,
    GPU_DAY,
    N1,
    N2,
    N3,
    OLD,
    SIGNED_2023,
    SWITCH_DAY,
    SWITCH_RIM,
    UTC,
    VBIOS_RIM,
    device,
    items,
    mismatches,
    party,
    refused,
    report,
)

DEVICES = {
    # name: nonce, architecture, driver, firmware, FWID matches, ueid
    "hopper/nvtrust-v2.7": (
        N1,
        "hopper",
        "550.90.07",
        "96.00.9F.00.01",
        True,
        "478176379286082186618948445787393647364802107249",
    ),
    "hopper/sdk-sample": (
        OLD,
        "hopper",
        "535.86.09",
        "96.00.5E.00.01",
        None,
        "395803620356496203949105887342232667833655422354",
    ),
    "hopper/sdk-expired": (
        N1,
        "hopper",
        "570.124.03",
        "96.00.5E.00.04",
        True,
        "513040271002320286744800603328389647958014137565",
    ),
    "blackwell/sdk-blackwell": (
        N1,
        "blackwell",
        "575.32",
        "97.00.88.00.0F",
        True,
        "474146966256510137525212816567191319424869109849",
    ),
    "switch/sdk-switch": (
        N1,
        "ls10",
        None,
        "96.10.55.00.01",
        None,
        "694931143880983876767046803400974855445978836716",
    ),
}


@pytest.fixture
def nvidia(shared_data: Path) -> Path:
    return shared_data / "nvidia"


# --- roots ---


@pytest.mark.parametrize("name", ["verifier_device_root.pem", "Root-CA.pem", "Root-CA-L1B.pem"])
def test_every_published_device_root_holds_the_pinned_key(nvidia: Path, name: str) -> None:
    (root,) = load_certificates((nvidia / "roots" / name).read_bytes())
    assert spki_digest(root) == NVIDIA_DEVICE_ROOT


def test_a_chain_ends_as_well_in_the_other_root_certificate_of_the_key(nvidia: Path) -> None:
    evidence = device(nvidia, "hopper/nvtrust-v2.7")
    blocks = evidence.chain.split(b"-----END CERTIFICATE-----\n")
    other = (nvidia / "roots" / "Root-CA-L1B.pem").read_bytes()
    chain = b"-----END CERTIFICATE-----\n".join([*blocks[:4], other])
    assert verify_device(replace(evidence, chain=chain), party(nvidia)).passed("gpu.signature")


# --- one device ---


@pytest.mark.parametrize("name", DEVICES)
def test_accepts_every_sound_report_and_reads_it(nvidia: Path, name: str) -> None:
    nonce, architecture, driver, firmware, fwid, ueid = DEVICES[name]
    result = verify_device(device(nvidia, name), party(nvidia, nonce=nonce))
    assert refused(result) is None
    facts = result.facts
    assert facts is not None
    assert (facts.architecture.value, facts.driver, facts.vbios) == (architecture, driver, firmware)
    assert (facts.identity.ueid, result.fwid_matched, facts.simulated) == (ueid, fwid, False)
    assert result.passed("gpu.nonce")


@pytest.mark.parametrize("name", DEVICES)
def test_refuses_any_other_nonce(nvidia: Path, name: str) -> None:
    for nonce in (bytes(32), N2, DEVICES[name][0][::-1]):
        result = verify_device(device(nvidia, name), party(nvidia, nonce=nonce))
        assert refused(result) == ("gpu.nonce", "NONCE_MISMATCH")


@pytest.mark.parametrize("name", DEVICES)
def test_refuses_the_chain_of_another_device(nvidia: Path, name: str) -> None:
    for other in DEVICES:
        if other != name:
            result = verify_device(device(nvidia, name, chain=other), party(nvidia))
            assert refused(result) == ("gpu.signature", "BAD_SIGNATURE")


def test_a_stray_byte_after_the_signature_is_named(nvidia: Path) -> None:
    evidence = device(nvidia, "hopper/trustee-coco1")
    assert refused(verify_device(evidence, party(nvidia))) == ("gpu.format", "TRAILING_BYTES")
    cut = verify_device(replace(evidence, report=evidence.report[:-1]), party(nvidia, nonce=COCO))
    assert refused(cut) is None
    assert cut.facts is not None
    assert cut.fwid_matched is True
    assert cut.facts.identity.ueid == "706537633744677806391970670929077420064002181513"
    fields = parse_gpu(parse_report(evidence.report[:-1]).opaque)
    assert (fields.mode, fields.opaque_version) == ("spt", 1)


def test_a_blackwell_names_the_reference_values_that_nvidia_publishes(nvidia: Path) -> None:
    facts = verify_device(device(nvidia, "blackwell/sdk-blackwell"), party(nvidia)).facts
    assert facts is not None
    assert facts.rim_ids[0] == "NV_GPU_CC_DRIVER_GB100_575.32"


def test_hopper_passes_in_full_within_its_window_only(nvidia: Path) -> None:
    evidence = device(nvidia, "hopper/nvtrust-v2.7")

    def at(moment: str) -> DeviceResult:
        when = datetime.fromisoformat(moment).replace(tzinfo=UTC)
        return verify_device(evidence, party(nvidia, DRIVER_RIM, VBIOS_RIM, at=when, nonce=N1))

    for moment in ("2026-01-07T18:39:21", "2026-03-01T00:00:00", "2026-06-01T02:08:29"):
        result = at(moment)
        assert refused(result) is None
        assert result.comparison is not None
        assert len(result.comparison.compared) == 32
        assert result.comparison.skipped == (35,)
        assert result.capabilities is not None
        assert result.capabilities.code_intact == "yes"
    assert refused(at("2026-01-07T18:39:20")) == ("gpu.firmware-rim", "CERTIFICATE_NOT_YET_VALID")
    assert refused(at("2026-06-01T02:08:30")) == ("gpu.driver-rim", "CERTIFICATE_EXPIRED")
    facts = at("2026-03-01T00:00:00").facts
    assert facts is not None
    assert facts.identity.hwmodel == "GH100 A01 GSP BROM"
    assert facts.identity.device_id == "48B02D92494BADF4"


def test_index_35_matches_either_way(nvidia: Path) -> None:
    parsed = parse_report(report(nvidia, "hopper/nvtrust-v2.7"))
    rim = parse_rim((nvidia / DRIVER_RIM).read_bytes()).claimed
    found = compare(parsed.measurements, [("driver", rim)], nvdec0=None)
    assert 35 in found.compared
    assert found.mismatched == ()


@pytest.mark.parametrize(
    ("source", "file", "indices"),
    [
        ("firmware", "rims/1010_0200_882_96005E0001_PROD.swidtag", [1, 2, 9, 11]),
        ("driver", "rims/NV_GPU_DRIVER_GH100_550.144.03.xml", [7, 22, 31, 39, 40]),
    ],
)
def test_reference_values_of_another_version_differ_and_are_not_used(
    nvidia: Path, source: Source, file: str, indices: list[int]
) -> None:
    name = "hopper/nvtrust-v2.7"
    assert mismatches(nvidia, name, (source, file)) == indices
    right = DRIVER_RIM if source == "firmware" else VBIOS_RIM
    result = verify_device(device(nvidia, name), party(nvidia, right, file))
    assert refused(result) == (f"gpu.{source}-rim", "NO_RIM")


@pytest.mark.parametrize(
    ("name", "file", "indices"),
    [
        ("hopper/sdk-sample", "rims/1010_0200_882_96005E0001_PROD.swidtag", []),
        ("hopper/sdk-expired", "rims/1010_0205_862_96005E0004_PROD.swidtag", [9]),
        (
            "hopper/sdk-sample",
            "negative/NV_GPU_VBIOS_1010_0200_882_96005E0001_measurement_mismatch.xml",
            [9],
        ),
    ],
)
def test_firmware_alone_compares_as_computed(nvidia: Path, name: str, file: str, indices: list[int]) -> None:
    parsed = parse_report(report(nvidia, name))
    judged = verify_rim((nvidia / file).read_bytes(), roots=NVIDIA_RIM_ROOTS, at=SIGNED_2023)
    assert judged.verified is not None
    found = compare(parsed.measurements, [("firmware", judged.verified.rim)], nvdec0=False)
    assert len(found.compared) == 12
    assert [each.index for each in found.mismatched] == indices


def test_the_coco_report_differs_at_index_9_of_the_old_firmware_values(nvidia: Path) -> None:
    parsed = parse_report(report(nvidia, "hopper/trustee-coco1")[:-1])
    rim = parse_rim((nvidia / "rims/1010_0200_882_960074001A_PROD.swidtag").read_bytes()).claimed
    found = compare(parsed.measurements, [("firmware", rim)], nvdec0=False)
    assert [each.index for each in found.mismatched] == [9]


def test_the_newer_of_two_genuine_issues_is_taken_though_the_older_would_match(nvidia: Path) -> None:
    old = "rims/1010_0200_882_96005E0001_PROD.swidtag"
    new = "negative/NV_GPU_VBIOS_1010_0200_882_96005E0001_measurement_mismatch.xml"
    store = Collateral.load(rims=[(nvidia / name).read_bytes() for name in (old, new)])
    taken = store.newest_rim("GPU", "96.00.5e.00.01")
    assert taken is not None
    assert taken.data == (nvidia / new).read_bytes()


def test_the_switch_passes_in_full_within_its_window_only(nvidia: Path) -> None:
    evidence = device(nvidia, "switch/sdk-switch")
    for moment in (datetime(2026, 5, 20, 22, 2, 51, tzinfo=UTC), datetime(2027, 11, 2, 23, 59, 59, tzinfo=UTC)):
        result = verify_device(evidence, party(nvidia, SWITCH_RIM, at=moment, nonce=N1))
        assert refused(result) is None
        assert result.comparison is not None
        assert len(result.comparison.compared) == 31
        assert result.facts is not None
        assert result.facts.identity.hwmodel == "LS_10 A01 FSP BROM"
    late = party(nvidia, SWITCH_RIM, at=datetime(2027, 11, 3, tzinfo=UTC))
    assert refused(verify_device(evidence, late)) == ("gpu.firmware-rim", "CERTIFICATE_EXPIRED")


def test_the_switch_report_is_read_field_by_field_as_nvidia_reads_it(nvidia: Path) -> None:
    wanted = json.loads((nvidia / "claims" / "switch_spdm_parsed_output.json").read_text())
    parsed = parse_report(report(nvidia, "switch/sdk-switch"))
    fields = parse_switch(parsed.opaque)

    def hexed(value: bytes | None) -> str:
        return f"0x{(value or b'').hex()}"

    assert hexed(parsed.responder_nonce) == wanted["Nonce"]
    assert hexed(parsed.signature) == wanted["Signature"]
    assert len(parsed.opaque) == wanted["OpaqueLength"]
    blocks = wanted["MeasurementRecord"]["MeasurementBlocks"]
    assert {str(index): hexed(block.value) for index, block in parsed.measurements.items()} == {
        index: block["DMTFSpecMeasurementValue"] for index, block in blocks.items()
    }
    opaque = wanted["OpaqueData"]["OpaqueDataField"]
    assert hexed(fields.pdi) == opaque["OPAQUE_FIELD_ID_DEVICE_PDI"]
    assert [hexed(pdi) for pdi in fields.gpu_pdis] == opaque["OPAQUE_FIELD_ID_SWITCH_GPU_PDIS"]
    assert (fields.position, fields.locked) == (2, True)


# --- several devices ---


def test_the_list_with_one_gpu_is_the_gpu_of_the_baseboard_with_another_nonce(nvidia: Path) -> None:
    (alone,) = items(nvidia, "hopper/hopper_evidence.json")
    first = items(nvidia, "hopper/ppcie_8gpu_evidence.json")[0]
    judged = [verify_device(each, party(nvidia)) for each in (alone, first)]
    assert [refused(each) for each in judged] == [None, None]
    facts = [each.facts for each in judged]
    assert facts[0] is not None
    assert facts[1] is not None
    assert facts[0].identity == facts[1].identity
    assert (facts[0].nonce, facts[1].nonce) == (N3, N2)
    assert facts[0].identity.ueid == "655333107904478077882826344426270545524203067314"
    replayed = verify_device(alone, party(nvidia, nonce=N2))
    assert refused(replayed) == ("gpu.nonce", "NONCE_MISMATCH")


def test_the_baseboard_is_one_closed_fabric(nvidia: Path) -> None:
    everything = items(nvidia, "hopper/ppcie_8gpu_evidence.json", "switch/ppcie_4switch_evidence.json")
    result = verify_devices(everything, party(nvidia, nonce=N2), expected_gpus=8)
    assert refused(result) is None
    facts = [each.facts for each in result.devices]
    assert len({each.identity.ueid for each in facts if each is not None}) == 12
    assert [each.fwid_matched for each in result.devices] == [True] * 8 + [None] * 4


@pytest.mark.parametrize("missing", [0, 7, 8, 11])
def test_a_baseboard_that_lacks_a_device_is_refused(nvidia: Path, missing: int) -> None:
    everything = items(nvidia, "hopper/ppcie_8gpu_evidence.json", "switch/ppcie_4switch_evidence.json")
    del everything[missing]
    result = verify_devices(everything, party(nvidia, nonce=N2))
    assert refused(result) == ("set.topology", "PPCIE_INCOMPLETE")


def test_a_foreign_switch_in_the_baseboard_is_refused(nvidia: Path) -> None:
    everything = items(nvidia, "hopper/ppcie_8gpu_evidence.json", "switch/ppcie_4switch_evidence.json")
    everything[-1:] = items(nvidia, "switch/switch_evidence_ls10.json")
    assert refused(verify_devices(everything, party(nvidia))) == ("set.one-answer", "NONCE_MISMATCH")


def test_four_times_one_switch_is_refused_though_each_passes(nvidia: Path) -> None:
    evidence = items(nvidia, "switch/multi_switch_ls10.json")
    judge = party(nvidia, SWITCH_RIM, at=SWITCH_DAY, nonce=N1)
    assert len(evidence) == 4
    assert [verify_devices([each], judge).result for each in evidence] == ["pass"] * 4
    assert refused(verify_devices(evidence, judge)) == ("set.distinct", "DUPLICATE_DEVICE")


def test_the_switch_list_is_the_switch_report(nvidia: Path) -> None:
    (item,) = items(nvidia, "switch/switch_evidence_ls10.json")
    assert item.report == report(nvidia, "switch/sdk-switch")
    assert refused(verify_device(item, party(nvidia, SWITCH_RIM, at=SWITCH_DAY, nonce=N1))) is None


def test_every_evidence_list_reads_as_it_is_written(nvidia: Path) -> None:
    for file in sorted(nvidia.glob("*/*evidence*.json")):
        listed = parse_evidence(file.read_bytes())
        assert parse_evidence(encode_evidence(listed)) == listed


# --- what must be refused ---


def test_a_report_with_an_invalid_signature_is_refused_under_every_chain(nvidia: Path) -> None:
    data = bytes.fromhex((nvidia / "negative" / "sdk-hopper-report-invalid-signature.hex").read_text().strip())
    chains = [file.read_bytes() for file in sorted((nvidia / "hopper").glob("*-chain.pem"))]
    chains += [each.chain for each in items(nvidia, "hopper/ppcie_8gpu_evidence.json")]
    assert len(chains) == 12
    for chain in chains:
        result = verify_device(DeviceEvidence(data, chain), party(nvidia, nonce=N1))
        assert refused(result) == ("gpu.signature", "BAD_SIGNATURE")
        assert result.facts is None


@pytest.mark.parametrize("case", ["case2", "case3"])
def test_a_chain_of_a_wrong_length_is_refused(nvidia: Path, case: str) -> None:
    chain = (nvidia / "negative" / f"trustee-hopper-chain-{case}.pem").read_bytes()
    evidence = DeviceEvidence(report(nvidia, "hopper/trustee-coco1")[:-1], chain)
    assert refused(verify_device(evidence, party(nvidia))) == ("gpu.chain", "CHAIN_LENGTH")


def test_the_four_certificate_chain_is_no_chain_at_any_length(nvidia: Path) -> None:
    certificates = load_certificates((nvidia / "negative" / "trustee-hopper-chain-case3.pem").read_bytes())
    with pytest.raises(HostileInput) as caught:
        verify_pinned_chain(certificates, roots=NVIDIA_DEVICE_ROOTS, length=range(4, 5), at=GPU_DAY)
    assert caught.value.slug == "WRONG_ISSUER"
