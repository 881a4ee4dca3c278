"""``cgpuctl collateral``: nothing gets into the store that does not verify, and what is in it is told."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from cgpu_agent.cli import https
from cgpu_agent.cli.arguments.collateral import DEFAULT_COLLATERAL
from cgpu_agent.daemon.config import GpuConfig
from cgpu_agent.verifier import collateralfolder
from cgpu_agent.wire.gpuevidence import EvidenceItem, encode_evidence
from fixtures.ctl import PASS, REFUSED, USAGE, Ctl, Ran
from fixtures.gpu import DRIVER, NONCE, VBIOS, Device
from fixtures.gpujudge import GPU, OTHER, SWITCH, VENDOR
from fixtures.gpupki import Signer, pem
from fixtures.gpurevocation import RESPONDER_EXTENSIONS, crl, edited_ocsp, ocsp_response
from fixtures.nvidiaservices import Services, running_services
from fixtures.pki import NOW

AT = "2026-06-01T12:00:00Z"
DRIVER_ID, VBIOS_ID = f"NV_GPU_DRIVER_GH100_{DRIVER}", "NV_GPU_VBIOS_1010_0200_882_96009F0001"
DRIVER_RIM, VBIOS_RIM = VENDOR.rims()
BOOT_ROM, PROVISIONER = GPU.signers[1:3]
GOOD = ocsp_response(BOOT_ROM.certificate, PROVISIONER)


class Store:
    """A store of the test's own, and the commands upon it."""

    def __init__(self, ctl: Ctl) -> None:
        self.ctl = ctl
        self.folder = ctl.folder / "store"
        self.roots = ["--rim-root", ctl.write("rim-root.pem", pem([VENDOR.rim_root.certificate]))]
        self.device_root = ["--device-root", ctl.write("device-root.pem", pem([VENDOR.root.certificate]))]

    def __call__(self, verb: str, *arguments: str, at: str = AT) -> Ran:
        return self.ctl("collateral", verb, "--store", str(self.folder), "--at", at, *self.roots, *arguments)

    def bring(self, *contents: bytes) -> Ran:
        files = [self.ctl.write(f"given{number}", content) for number, content in enumerate(contents)]
        return self("import", "--json", *files)

    def listed(self, at: str = AT) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self("list", "--json", at=at).json["files"]
        return found

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []

    @property
    def contents(self) -> set[bytes]:
        return {path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def store(ctl: Ctl) -> Store:
    return Store(ctl)


def outcomes(ran: Ran) -> list[tuple[str, str | None]]:
    return [(item["result"], item["slug"]) for item in ran.json["items"]]


def envelope(name: str, document: bytes) -> bytes:
    return json.dumps({"id": name, "rim": base64.b64encode(document).decode(), "sha256": "00", "new": [1]}).encode()


def judge(store: Store, *more: str, device: Device = GPU) -> Ran:
    report = store.ctl.write("report", device.report())
    files = ["--report", report, "--chain", store.ctl.write("chain.pem", device.chain)]
    trust = [*store.device_root, *store.roots, "--collateral", str(store.folder)]
    return store.ctl("gpu", "verify", "--nonce", NONCE.hex(), "--at", AT, *trust, *files, "--json", *more)


# --- import ---


def test_the_store_is_that_of_the_agent_by_default() -> None:
    assert GpuConfig().collateral == DEFAULT_COLLATERAL


def test_what_was_imported_serves_a_verification(store: Store) -> None:
    paper = crl(PROVISIONER)
    text = x509.load_der_x509_crl(paper).public_bytes(Encoding.PEM)
    ran = store.bring(DRIVER_RIM, envelope(VBIOS_ID, VBIOS_RIM), paper, GOOD)
    assert (ran.code, outcomes(ran)) == (PASS, [("stored", None)] * 4)
    assert store.contents == {DRIVER_RIM, VBIOS_RIM, paper, GOOD}
    assert judge(store).code == PASS
    again = store.bring(DRIVER_RIM, VBIOS_RIM, text, GOOD)
    assert (again.code, outcomes(again)) == (PASS, [("unchanged", None)] * 4)
    assert len(store.names) == 4


def test_names_say_what_is_in_a_file_and_nothing_that_its_sender_chose(store: Store) -> None:
    hostile = store.ctl.folder / "..\n;rm -rf $HOME.xml"
    hostile.write_bytes(DRIVER_RIM)
    assert store("import", str(hostile)).code == PASS
    (name,) = store.names
    assert name.startswith(f"GH100_GPU_{DRIVER}-")
    assert name.endswith(".xml")


def test_a_rim_that_does_not_verify_is_not_stored(store: Store) -> None:
    stranger = Signer.root("Stranger RIM Root CA")
    chain = (stranger.issue("L3"), stranger)
    bad = [
        (VENDOR.rim(chain=chain), "UNKNOWN_ROOT"),
        (VENDOR.rim(tamper={'index="7"': 'index="6"'}), "BAD_RIM"),
        (VENDOR.rim(tamper={f'colloquialVersion="{DRIVER}"': 'colloquialVersion="580.0"'}), "RIM_DIGEST_MISMATCH"),
        (VENDOR.rim(not_after=NOW - timedelta(days=1)), "CERTIFICATE_EXPIRED"),
        (envelope(VBIOS_ID, DRIVER_RIM), "WRONG_RIM"),
        (envelope("../../etc/passwd", DRIVER_RIM), "BAD_FIELD"),
        (envelope(DRIVER_ID, DRIVER_RIM)[:-20], "BAD_JSON"),
        (b"<x/>", "BAD_RIM"),
        (b"", "UNKNOWN_COLLATERAL"),
        (b"\x30\x03\x0a\x01\x06", "UNKNOWN_COLLATERAL"),
        (pem([BOOT_ROM.certificate]), "BAD_CRL"),
        (bytes(collateralfolder.MAX_FILE + 1), "FILE_TOO_LARGE"),
    ]
    ran = store.bring(*(content for content, _ in bad), VBIOS_RIM)
    assert ran.code == REFUSED
    assert outcomes(ran) == [("refused", slug) for _, slug in bad] + [("stored", None)]
    assert store.contents == {VBIOS_RIM}
    assert "Traceback" not in ran.err


def test_11_an_older_issue_never_gets_in_beside_a_newer_one(store: Store) -> None:
    older, newer = VENDOR.rim(not_before=NOW - timedelta(days=500)), VENDOR.rim(not_before=NOW - timedelta(days=10))
    assert store.bring(newer).code == PASS
    ran = store.bring(older)
    assert (ran.code, outcomes(ran)) == (REFUSED, [("refused", "OLDER_ISSUE")])
    assert store.contents == {newer}


def test_11_a_newer_issue_comes_beside_the_older_and_counts_alone(store: Store) -> None:
    older = VENDOR.rim(not_before=NOW - timedelta(days=500))
    newer = VENDOR.rim(goldens={7: (bytes(48),)}, not_before=NOW - timedelta(days=10))
    ran = store.bring(older, VBIOS_RIM, newer)
    assert outcomes(ran) == [("stored", None)] * 3
    assert store.contents == {older, newer, VBIOS_RIM}
    assert judge(store).json["reason"]["slug"] == "MEASUREMENT_MISMATCH"
    states = {each["state"]: each["about"][2] for each in store.listed() if each["state"] != "good"}
    assert states == {"superseded": DRIVER}


def test_11_two_issues_of_one_moment_do_not_both_get_in(store: Store) -> None:
    moment = NOW - timedelta(days=10)
    one, other = VENDOR.rim(not_before=moment), VENDOR.rim(not_before=moment, goldens={7: (bytes(48),)})
    ran = store.bring(one, other)
    assert outcomes(ran) == [("stored", None), ("refused", "AMBIGUOUS_RIM")]
    assert store.contents == {one}


def test_another_chip_or_version_is_no_older_issue(store: Store) -> None:
    old = NOW - timedelta(days=500)
    others = [VENDOR.rim(product="GB100", not_before=old), VENDOR.rim("580.1", not_before=old)]
    ran = store.bring(DRIVER_RIM, *others)
    assert outcomes(ran) == [("stored", None)] * 3


def test_a_file_with_another_content_is_not_written_over(store: Store) -> None:
    assert store.bring(DRIVER_RIM).code == PASS
    (path,) = store.folder.iterdir()
    path.write_bytes(b"something else")
    ran = store.bring(DRIVER_RIM)
    assert (ran.code, outcomes(ran)) == (REFUSED, [("refused", "CANNOT_WRITE")])
    assert path.read_bytes() == b"something else"
    assert len(store.names) == 1


def test_a_store_takes_no_more_than_the_agent_would_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgpu_agent.cli.collateralstore.MAX_FILES", 1)
    ran = store.bring(DRIVER_RIM, VBIOS_RIM, DRIVER_RIM)
    assert outcomes(ran) == [("stored", None), ("refused", "TOO_MANY_FILES"), ("unchanged", None)]


# --- list ---


def test_lists_what_is_there_and_until_when_it_is_good(store: Store) -> None:
    store.bring(DRIVER_RIM, crl(PROVISIONER, BOOT_ROM.certificate), GOOD)
    rim, paper, answer = store.listed()
    assert (rim["kind"], rim["about"], rim["state"]) == ("rim", ["GH100", "GPU", DRIVER], "good")
    assert (paper["kind"], paper["about"][1], paper["state"]) == ("crl", "1 revoked", "good")
    assert answer["about"] == [f"{BOOT_ROM.certificate.serial_number:x} good"]
    assert (answer["since"], answer["until"]) == ("2026-06-01T11:00:00+00:00", "2026-06-02T11:00:00+00:00")
    late = {each["kind"]: each["state"] for each in store.listed("2026-06-03T12:00:00Z")}
    assert late == {"rim": "good", "crl": "stale", "ocsp": "stale"}
    assert {each["state"] for each in store.listed("2028-01-01T00:00:00Z")} == {"stale"}
    assert {each["state"] for each in store.listed("2025-01-01T00:00:00Z")} == {"stale"}
    told = store("list")
    assert told.code == PASS
    assert f"GH100, GPU, {DRIVER}" in told.out


def test_names_files_that_the_agent_would_not_take(store: Store) -> None:
    store.folder.mkdir()
    stranger = Signer.root("Stranger RIM Root CA")
    for name, content in {
        "a.xml": b"",
        "b.swidtag": b"<!DOCTYPE x>",
        "c.crl": b"x",
        "d.ocsp": b"\x30\x03\x0a\x01\x06",
        "e.xml": VENDOR.rim(chain=(stranger.issue("L3"), stranger)),
        "f.crl": bytes(collateralfolder.MAX_FILE + 1),
        "g\x1b[2J.crl": b"",
        "README": b"",
    }.items():
        (store.folder / name).write_bytes(content)
    (store.folder / "h.xml").mkdir()
    ran = store("list", "--json")
    assert ran.code == REFUSED
    assert [(each["state"], each["reason"]["slug"]) for each in ran.json["files"]] == [
        ("broken", "BAD_XML"),
        ("broken", "XML_FORBIDDEN"),
        ("broken", "BAD_CRL"),
        ("broken", "BAD_OCSP"),
        ("refused", "UNKNOWN_ROOT"),
        ("broken", "FILE_TOO_LARGE"),
        ("broken", "BAD_CRL"),
        ("broken", "NO_FILE"),
    ]
    told = store("list")
    assert "\x1b" not in told.out
    assert "Traceback" not in told.err


def test_names_an_answer_that_would_refuse_what_it_is_about(store: Store) -> None:
    brief = PROVISIONER.issue("brief", RESPONDER_EXTENSIONS, not_after=NOW + timedelta(days=3))
    store.bring(DRIVER_RIM, VBIOS_RIM, ocsp_response(BOOT_ROM.certificate, PROVISIONER, responder=brief))
    assert [each["state"] for each in store.listed("2026-06-04T11:00:00Z") if each["kind"] == "ocsp"] == ["stale"]
    late = "2026-06-04T13:00:00Z"
    assert [each["state"] for each in store.listed(late) if each["kind"] == "ocsp"] == ["refused"]
    assert judge(store, "--at", late).json["reason"]["slug"] == "CERTIFICATE_EXPIRED"


def test_a_store_that_is_not_there_is_empty(store: Store) -> None:
    assert store("list").code == PASS
    assert store.listed() == []


# --- fetch ---


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    with running_services(tmp_path) as running:
        monkeypatch.setenv("SSL_CERT_FILE", str(running.authority))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        running.publish(DRIVER_ID, DRIVER_RIM, VENDOR.rim_chain)
        running.publish(VBIOS_ID, VBIOS_RIM, VENDOR.rim_chain)
        running.know(*GPU.signers[1:])
        yield running


def fetch(store: Store, services: Services, *arguments: str, at: str = AT) -> Ran:
    urls = ["--rim-url", services.url, "--ocsp-url", services.url]
    return store("fetch", "--json", *urls, *store.device_root, *arguments, at=at)


def listed(store: Store, *devices: Device) -> list[str]:
    items = [
        EvidenceItem("LS10" if each.is_switch else "HOPPER", NONCE.hex(), each.report(), each.chain, None, None)
        for each in devices
    ]
    return ["--evidence", store.ctl.write("evidence.json", encode_evidence(items))]


def by_kind(ran: Ran, kind: str) -> list[tuple[str, str | None]]:
    return [(item["result"], item["slug"]) for item in ran.json["items"] if item["kind"] == kind]


def test_fetches_what_a_device_needs_for_a_verification_without_doubts(store: Store, services: Services) -> None:
    ran = fetch(store, services, *listed(store, GPU))
    assert (ran.code, ran.json["result"]) == (PASS, "pass")
    assert by_kind(ran, "rim") == [("stored", None)] * 2
    # Boot ROM, provisioner, family; two signers, and two CAs that they share.
    assert by_kind(ran, "ocsp") == [("stored", None)] * 7
    assert f"rim {DRIVER_ID}: stored" in ran.err
    assert judge(store, "--require-revocation").code == PASS
    again = fetch(store, services, *listed(store, GPU))
    assert by_kind(again, "rim") == [("unchanged", None)] * 2
    assert len(store.names) == 2 + 7


def test_fetches_by_name(store: Store, services: Services) -> None:
    ran = fetch(store, services, "--rim-id", DRIVER_ID)
    assert ran.code == PASS
    assert store.contents > {DRIVER_RIM}
    assert by_kind(ran, "ocsp") == [("stored", None)] * 3


def test_nothing_is_asked_in_the_name_of_a_device_that_did_not_sign(store: Store, services: Services) -> None:
    report = store.ctl.write("report", GPU.report())
    chain = store.ctl.write("chain.pem", OTHER.chain)
    ran = fetch(store, services, "--report", report, "--chain", chain)
    assert (ran.code, by_kind(ran, "device")) == (REFUSED, [("refused", "BAD_SIGNATURE")])
    assert services.asked == []


def test_what_is_good_is_kept_though_something_else_fails(store: Store, services: Services) -> None:
    ran = fetch(store, services, *listed(store, GPU, SWITCH))
    assert ran.code == REFUSED
    assert by_kind(ran, "rim") == [("stored", None), ("stored", None), ("refused", "NO_RIM")]
    assert ("refused", "BAD_OCSP") in by_kind(ran, "ocsp")  # the responder does not know the switch
    assert judge(store, "--require-revocation").code == PASS


def answering(services: Services, path: str, status: int, body: bytes | None) -> None:
    def answer(asked: str, real: int, given: bytes) -> tuple[int, bytes] | None:
        if not asked.startswith(path):
            return real, given
        return None if body is None else (status, body)

    services.answer = answer


STRANGER = Signer.root("Stranger RIM Root CA")
OTHERS_RIM = VENDOR.rim(chain=(STRANGER.issue("L3"), STRANGER))
HOSTILE_RIMS: dict[str, tuple[bytes, str]] = {
    "another RIM in this name": (envelope(DRIVER_ID, VBIOS_RIM), "WRONG_RIM"),
    "another version in this name": (envelope(DRIVER_ID, VENDOR.rim("580.1")), "WRONG_RIM"),
    "another chip in this name": (envelope(DRIVER_ID, VENDOR.rim(product="GB100")), "WRONG_RIM"),
    "a switch in this name": (envelope(DRIVER_ID, VENDOR.rim(edition="SWITCH")), "WRONG_RIM"),
    "another name": (envelope(VBIOS_ID, VBIOS_RIM), "WRONG_RIM"),
    "of another root": (envelope(DRIVER_ID, OTHERS_RIM), "UNKNOWN_ROOT"),
    "cut": (envelope(DRIVER_ID, DRIVER_RIM)[:-9], "BAD_JSON"),
    "no JSON": (DRIVER_RIM, "BAD_JSON"),
    "a list": (b"[]", "BAD_JSON"),
    "no RIM in it": (b'{"id": "%s"}' % DRIVER_ID.encode(), "BAD_FIELD"),
    "huge": (b" " * (1 << 20), "BAD_ANSWER"),
    "empty": (b"", "BAD_JSON"),
}


@pytest.mark.parametrize("case", HOSTILE_RIMS)
def test_a_hostile_answer_of_the_rim_service_is_not_stored(store: Store, services: Services, case: str) -> None:
    body, slug = HOSTILE_RIMS[case]
    answering(services, f"/v1/rim/{DRIVER_ID}", 200, body)
    ran = fetch(store, services, "--rim-id", DRIVER_ID, "--rim-id", VBIOS_ID)
    assert ran.code == REFUSED
    assert by_kind(ran, "rim") == [("refused", slug), ("stored", None)]
    assert VBIOS_RIM in store.contents
    assert [name for name in store.names if DRIVER in name] == []


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 500])
def test_no_status_but_200_counts_and_no_redirect_is_followed(store: Store, services: Services, status: int) -> None:
    services.location = f"{services.url}/v1/rim/{VBIOS_ID}"
    answering(services, f"/v1/rim/{DRIVER_ID}", status, envelope(DRIVER_ID, DRIVER_RIM))
    ran = fetch(store, services, "--rim-id", DRIVER_ID)
    assert (ran.code, by_kind(ran, "rim")) == (REFUSED, [("refused", "SERVICE_REFUSED")])
    assert services.asked == [f"/v1/rim/{DRIVER_ID}"]
    assert store.names == []


def test_an_answer_in_drops_ends_in_time(store: Store, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes well within a socket's timeout, and all of them would take hours."""
    monkeypatch.setattr(https, "SECONDS", 3)
    services.drip = 0.2
    ran = fetch(store, services, "--rim-id", DRIVER_ID, "--rim-id", VBIOS_ID)
    assert ran.code == REFUSED
    assert by_kind(ran, "rim") == [("refused", "SERVICE_SILENT")] * 2
    assert len(services.asked) == 1


def test_the_answer_must_be_in_the_name_that_was_asked_by(store: Store, services: Services) -> None:
    """The board is in the name alone, so only the service can say that it answers for another one."""
    other = VBIOS_ID.replace("882", "885")
    answering(services, f"/v1/rim/{other}", 200, envelope(VBIOS_ID, VBIOS_RIM))
    assert outcomes(fetch(store, services, "--rim-id", other)) == [("refused", "WRONG_RIM")]


def test_a_service_that_cuts_the_connection_is_asked_once(store: Store, services: Services) -> None:
    answering(services, "/", 200, None)
    ran = fetch(store, services, *listed(store, GPU))
    assert ran.code == REFUSED
    assert set(outcomes(ran)) == {("read", None), ("refused", "SERVICE_SILENT")}
    assert len(services.asked) == 2
    assert "Traceback" not in ran.err


def test_a_service_with_an_unknown_certificate_is_not_spoken_to(
    store: Store, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    ran = fetch(store, services, "--rim-id", DRIVER_ID)
    assert (ran.code, outcomes(ran)) == (REFUSED, [("refused", "SERVICE_SILENT")])
    assert services.asked == []


def test_11_the_service_cannot_go_back_to_an_older_issue(store: Store, services: Services) -> None:
    assert fetch(store, services, "--rim-id", DRIVER_ID).code == PASS
    services.publish(DRIVER_ID, VENDOR.rim(not_before=NOW - timedelta(days=500)), VENDOR.rim_chain)
    ran = fetch(store, services, "--rim-id", DRIVER_ID)
    assert (ran.code, by_kind(ran, "rim")) == (REFUSED, [("refused", "OLDER_ISSUE")])
    assert DRIVER_RIM in store.contents


LONG_AGO = (NOW - timedelta(days=9), NOW - timedelta(days=8))
AHEAD = (NOW + timedelta(days=8), NOW + timedelta(days=9))
HOSTILE_OCSP: dict[str, tuple[dict[str, object], str]] = {
    "another nonce": ({"nonce": bytes(32)}, "OCSP_NONCE"),
    "no nonce": ({"nonce": None}, "OCSP_NONCE"),
    "another certificate": ({"serial": True}, "OCSP_NO_ANSWER"),
    "expired": ({"life": LONG_AGO}, "OCSP_NO_ANSWER"),
    "from the future": ({"life": AHEAD}, "OCSP_NO_ANSWER"),
    "of more than was asked": ({"times": 2}, "OCSP_NO_ANSWER"),
    "of a stranger": ({"signer": STRANGER}, "BAD_OCSP"),
    "of the device's own key": ({"signer": GPU.leaf}, "BAD_OCSP"),
}


@pytest.mark.parametrize("case", HOSTILE_OCSP)
def test_12_a_hostile_ocsp_response_is_not_stored(store: Store, services: Services, case: str) -> None:
    services.ocsp, slug = HOSTILE_OCSP[case]
    ran = fetch(store, services, *listed(store, GPU))
    assert ran.code == REFUSED
    assert set(by_kind(ran, "ocsp")) == {("refused", slug)}
    assert store.contents == {DRIVER_RIM, VBIOS_RIM}


def test_12_a_recorded_answer_is_no_answer(store: Store, services: Services) -> None:
    recorded: list[bytes] = []

    def replay(path: str, status: int, body: bytes) -> tuple[int, bytes]:
        if path == "/":
            recorded.append(body)
            return status, recorded[0] if len(recorded) > 7 else body
        return status, body

    services.answer = replay
    assert fetch(store, services, *listed(store, GPU)).code == PASS
    first = fetch(store, services, *listed(store, GPU)).json["items"][3]
    assert (first["kind"], first["slug"]) == ("ocsp", "OCSP_NONCE")


@pytest.mark.parametrize("body", [b"", b"\x30\x03\x0a\x01\x06", b"x" * 100, GOOD], ids=["empty", "no", "junk", "old"])
def test_an_ocsp_response_that_is_none_is_not_stored(store: Store, services: Services, body: bytes) -> None:
    services.answer = lambda path, status, given: (status, body if path == "/" else given)
    ran = fetch(store, services, "--rim-id", DRIVER_ID)
    assert {result for result, _ in by_kind(ran, "ocsp")} == {"refused"}
    assert store.contents == {DRIVER_RIM}


def test_a_revocation_is_kept_and_told(store: Store, services: Services) -> None:
    assert fetch(store, services, *listed(store, GPU)).code == PASS
    services.revoked.add(PROVISIONER.certificate.serial_number)
    ran = fetch(store, services, *listed(store, GPU))
    assert ran.code == REFUSED
    assert by_kind(ran, "ocsp").count(("revoked", "CERTIFICATE_REVOKED")) == 1
    assert judge(store).json["reason"]["slug"] == "CERTIFICATE_REVOKED"
    services.revoked.clear()  # whatever is said later: it was revoked
    assert fetch(store, services, *listed(store, GPU)).code == PASS
    assert judge(store).json["reason"]["slug"] == "CERTIFICATE_REVOKED"


def test_newer_answers_replace_older_ones_about_their_certificate_alone(store: Store, services: Services) -> None:
    says_nothing = edited_ocsp(ocsp.load_der_ocsp_response(GOOD), PROVISIONER, times=0)
    store.bring(ocsp_response(OTHER.signers[1].certificate, OTHER.signers[2]), GOOD, says_nothing)
    fetch(store, services, *listed(store, GPU))
    before = set(store.names)
    fetch(store, services, *listed(store, GPU))
    assert len(store.names) == len(before)
    assert GOOD not in store.contents
    assert says_nothing in store.contents
    assert [each["state"] for each in store.listed() if not each["about"]] == ["stale"]
    kept = [
        each for each in store.listed() if f"{OTHER.signers[1].certificate.serial_number:x} good" in each["about"]
    ]
    assert len(kept) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--rim-id", "../../etc/passwd"],
        ["--rim-id", "NV_GPU_DRIVER_GH100_550.90.07?x=y"],
        ["--rim-id", DRIVER_ID, "--rim-url", "http://127.0.0.1"],
        ["--rim-id", DRIVER_ID, "--ocsp-url", "http://127.0.0.1"],
        ["--rim-id", DRIVER_ID, "--rim-url", "https://user@host"],
        ["--rim-id", DRIVER_ID, "--rim-url", "https://host/?x"],
        ["--rim-id", DRIVER_ID, "--rim-root", "/nowhere"],
        ["--report", "/nowhere"],
        ["--evidence", "/nowhere"],
    ],
)
def test_a_bad_argument_is_a_usage_error(store: Store, arguments: list[str]) -> None:
    assert store("fetch", *arguments).code == USAGE


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]"])
def test_evidence_that_cannot_be_read_is_refused(store: Store, services: Services, content: bytes) -> None:
    ran = fetch(store, services, "--evidence", store.ctl.write("bad.json", content))
    assert ran.code == REFUSED
    assert services.asked == []


def test_a_device_that_does_not_name_its_versions_is_told(store: Store, services: Services) -> None:
    report = GPU.report(fields=GPU.fields(DRIVER_VERSION=None))
    files = ["--report", store.ctl.write("report", report), "--chain", store.ctl.write("chain.pem", GPU.chain)]
    ran = fetch(store, services, *files)
    assert ran.code == REFUSED
    assert by_kind(ran, "rim") == [("refused", "NO_RIM"), ("stored", None)]
    assert f"rim {VBIOS_ID}" in ran.err
    assert VBIOS.replace(".", "") in VBIOS_ID
