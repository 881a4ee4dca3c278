"""Every third-party log gives the result an independent parser found: events, banks, padding, replay, Secure Boot."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.boot import boot_story, secure_boot
from cgpu_agent.verifier.explain_boot import best_bank, to_json
from cgpu_agent.verifier.replay import compare, replay, startup_locality
from cgpu_agent.wire.eventlog import EventLog, parse
from cgpu_agent.wire.eventtypes import type_name
from cgpu_agent.wire.tpm import Quoted, parse_attest, pcr_digest
from cgpu_agent.wire.uefi import parse_variable

NAMES = (
    "ccel/cos-113-intel-tdx-dupe-separator-unpadded.bin",
    "ccel/cos-113-intel-tdx.bin",
    "ccel/dstack-ccel.bin",
    "ccel/event_log.bin",
    "ccel/intel-ita-CCEL.data.bin",
    "ccel/trustee-CCEL_AAEL_alibabacloud.bin",
    "ccel/trustee-CCEL_data_ovmf.bin",
    "dstack/gcp-tdx-tpm_eventlog.bin",
    "gce-gotpmtools/confidential-gke-debug-251000_eventlog.bin",
    "gce-gotpmtools/cos-85-amd-sev.bin",
    "gce-gotpmtools/debian-10.bin",
    "gce-gotpmtools/eventlogwithsp800155.bin",
    "gce-gotpmtools/ubuntu-1804-amd-sev.bin",
    "gce-gotpmtools/ubuntu-2104-no-dbx.bin",
    "gce-gotpmtools/ubuntu-2104-no-secure-boot.bin",
    "go-attestation/crypto_agile_eventlog",
    "go-attestation/linux_tpm12.eventlog.bin",
    "go-attestation/short_no_action_eventlog",
    "go-attestation/ubuntu_2104_shielded_vm_no_secure_boot_eventlog",
    "go-attestation/windows_gcp_shielded_vm.eventlog.bin",
    "intel-ita/binary_bios_measurements12",
    "tpm2-tools/event-bootorder.bin",
    "tpm2-tools/event-postcode.bin",
    "tpm2-tools/event-sd-boot-fedora37.bin",
    "tpm2-tools/event-uefi-sha1-log.bin",
    "tpm2-tools/event-uefiaction.bin",
    "tpm2-tools/event-uefiservices.bin",
    "tpm2-tools/event-uefivar.bin",
    "tpm2-tools/event.bin",
)
BROKEN = "tpm2-tools/specid-vendordata.bin"

NO_CONCLUSION = {
    "ccel/cos-113-intel-tdx-dupe-separator-unpadded.bin": "duplicate separator",
    "ccel/event_log.bin": "duplicate separator",
    "ccel/intel-ita-CCEL.data.bin": "duplicate separator",
    "ccel/trustee-CCEL_data_ovmf.bin": "duplicate separator",
    "go-attestation/linux_tpm12.eventlog.bin": "no SecureBoot variable",  # digests cover values without names
    "go-attestation/short_no_action_eventlog": "no events",
    "tpm2-tools/event-uefiaction.bin": "no events",
    "tpm2-tools/event-uefiservices.bin": "no events",
    "tpm2-tools/event-uefivar.bin": "no separator",
    "tpm2-tools/event.bin": "no events",
}


@pytest.fixture(scope="module")
def expectations(shared_data: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shared_data / "eventlogs" / "expected.json").read_text())
    return found


def load(shared_data: Path, name: str) -> EventLog:
    return parse((shared_data / "eventlogs" / name).read_bytes())


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    # Some vendors' certificates carry attributes the X.509 library complains about.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_no_log_is_forgotten(expectations: dict[str, Any]) -> None:
    assert {*NAMES, BROKEN} == set(expectations)


@pytest.mark.parametrize("name", NAMES)
def test_parses_as_expected(shared_data: Path, expectations: dict[str, Any], name: str) -> None:
    expected, log = expectations[name], load(shared_data, name)
    assert log.format == expected["format"]
    assert log.kind == ("ccel" if name.startswith("ccel/") else "tpm")
    assert (len(log.events), log.padding) == (expected["n_events"], expected["trailing"])
    assert startup_locality(log) == expected["startup_locality"]
    assert sorted({type_name(event.claimed_type) for event in log.events}) == expected["event_types"]
    if expected["spec"] is None:
        assert log.spec is None
    else:
        assert log.spec is not None
        assert [list(each) for each in log.spec.algorithms] == expected["spec"]["algs"]
        assert log.spec.uintn_size == expected["spec"]["uintn"]
        assert log.spec.vendor_info.hex() == expected["spec"]["vendor"]


@pytest.mark.parametrize("name", NAMES)
def test_replays_every_bank_as_expected(shared_data: Path, expectations: dict[str, Any], name: str) -> None:
    expected, log = expectations[name]["replayed"], load(shared_data, name)
    assert sorted(log.banks) == sorted(expected)
    for bank in log.banks:
        found = {str(index): value.hex() for index, value in replay(log, bank).pcrs.items()}
        assert found == expected[bank]


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_values_of_the_origin(shared_data: Path, expectations: dict[str, Any], name: str) -> None:
    expected = expectations[name]
    if "upstream_pcrs" not in expected:
        pytest.skip("the origin of this log gives no PCR values")
    log = load(shared_data, name)
    for bank, values in expected["upstream_pcrs"].items():
        actual = {int(index): bytes.fromhex(value) for index, value in values.items()}
        result = compare(replay(log, bank), actual)
        assert set(actual) <= set(result)
        assert {index for index, each in result.items() if each.status == "mismatch"} == set()
        differing = {index for index in actual if result[index].status == "unexplained"}
        assert differing <= {10}


@pytest.mark.parametrize("name", NAMES)
def test_reads_the_secure_boot_variable_as_expected(
    shared_data: Path, expectations: dict[str, Any], name: str
) -> None:
    expected = expectations[name]["secureboot_var"]
    found: list[str] = []
    for event in load(shared_data, name).events:
        if type_name(event.claimed_type) == "EV_EFI_VARIABLE_DRIVER_CONFIG":
            variable = parse_variable(event.data)
            if variable.name == "SecureBoot":
                found.append(variable.data.hex() or "EMPTY")
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize("name", NAMES)
def test_concludes_secure_boot_only_where_the_digests_allow_it(
    shared_data: Path, expectations: dict[str, Any], name: str
) -> None:
    log = load(shared_data, name)
    found = secure_boot(log, best_bank(log) or "")
    if name in NO_CONCLUSION:
        assert found.state == "unknown"
        assert NO_CONCLUSION[name] in found.reason
    else:
        expected = expectations[name]["secureboot_var"]
        assert found.state == ("enabled" if expected == "01" else "disabled")
        assert [each.variable for each in found.authorities] == expectations[name]["authority_events"]
        assert all(each.proven for each in found.authorities)


@pytest.mark.parametrize("name", NAMES)
def test_tells_every_measured_event_of_every_log(shared_data: Path, name: str) -> None:
    log = load(shared_data, name)
    story = boot_story(log, best_bank(log) or "")
    told = {index for each in story.stages for statement in each.statements for index in statement.events}
    assert told == {event.index for event in log.events if event.measured}
    assert json.loads(json.dumps(to_json(log)))["events"][0]["index"] == 0


def test_the_defect_free_twin_of_the_doubled_separator_is_concluded(shared_data: Path) -> None:
    assert secure_boot(load(shared_data, "ccel/cos-113-intel-tdx.bin"), "sha384").state == "disabled"


def test_refuses_vendor_info_that_its_record_does_not_hold(shared_data: Path) -> None:
    with pytest.raises(HostileInput, match="TRUNCATED"):
        load(shared_data, BROKEN)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("ccel/")])
def test_padding_is_for_a_ccel_only(shared_data: Path, name: str) -> None:
    data = (shared_data / "eventlogs" / name).read_bytes()
    with pytest.raises(HostileInput):
        parse(data + b"\xff" * 64)


def test_the_vtpm_log_of_a_tdx_guest_matches_its_quote(shared_data: Path) -> None:
    quote = parse_attest((shared_data / "eventlogs" / "dstack" / "tpm_quote_sample.bin").read_bytes())
    assert isinstance(quote.attested, Quoted)
    values = replay(load(shared_data, "dstack/gcp-tdx-tpm_eventlog.bin"), "sha256").pcrs
    assert pcr_digest(values, (0, 1, 2), "sha256") == quote.attested.pcr_digest


@pytest.mark.parametrize("bank", ["sha1", "sha256", "sha384"])
def test_a_cos_log_explains_its_quoted_pcrs_but_ima(shared_data: Path, bank: str) -> None:
    folder = shared_data / "eventlogs" / "quotes" / "gce-cos-85-no-nonce"
    values = json.loads((folder / f"pcrs_{bank}.json").read_text())
    actual = {int(index): bytes.fromhex(value) for index, value in values.items()}
    result = compare(replay(parse((folder / "eventlog.bin").read_bytes()), bank), actual)
    assert {index for index, each in result.items() if each.status == "explained"} == set(range(10))
    assert {index for index, each in result.items() if each.status == "mismatch"} == set()
    assert result[10].status == "unexplained"
