"""``cgpuctl gpu verify``: exit status, JSON, and what a user may hand over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cgpu_agent.wire.gpuevidence import EvidenceItem, encode_evidence
from fixtures.ctl import PASS, REFUSED, USAGE, Ctl, Ran
from fixtures.gpu import DRIVER, NONCE, VBIOS, Device
from fixtures.gpujudge import GPU, OTHER, SWITCH, VENDOR
from fixtures.gpupki import digest, pem
from fixtures.gpurevocation import crl, ocsp_response

AT = "2026-06-01T12:00:00Z"


def item(device: Device = GPU, **changed: Any) -> EvidenceItem:
    arch = "LS10" if device.is_switch else "HOPPER"
    given = {"arch": arch, "nonce": NONCE.hex(), "report": device.report(), "chain": device.chain}
    return EvidenceItem(**({**given, "driver": None, "vbios": None} | changed))


class Judge:
    """The honest relying party; each call adds to its arguments."""

    def __init__(self, ctl: Ctl) -> None:
        self.ctl = ctl
        self.roots = [
            *("--device-root", ctl.write("device-root.pem", pem([VENDOR.root.certificate]))),
            *("--rim-root", ctl.write("rim-root.pem", pem([VENDOR.rim_root.certificate]))),
        ]
        self.rims: list[str] = []
        for number, document in enumerate([*VENDOR.rims(), *VENDOR.rims("LS_10")]):
            self.rims += ["--rim", ctl.write(f"rim{number}.xml", document)]

    def files(self, device: Device = GPU, *, text: bool = True) -> list[str]:
        report = device.report()
        written = self.ctl.write("report", f"{report.hex()}\n".encode() if text else report)
        return ["--report", written, "--chain", self.ctl.write("chain.pem", device.chain)]

    def listed(self, *items: EvidenceItem) -> list[str]:
        return ["--evidence", self.ctl.write("evidence.json", encode_evidence(items))]

    def __call__(self, *arguments: str, rims: bool = True) -> Ran:
        more = self.rims if rims else []
        return self.ctl("gpu", "verify", "--nonce", NONCE.hex(), "--at", AT, *self.roots, *more, *arguments)


@pytest.fixture
def judge(ctl: Ctl) -> Judge:
    return Judge(ctl)


@pytest.mark.parametrize("text", [True, False], ids=["hex", "raw"])
def test_passes_an_honest_gpu_in_either_form(judge: Judge, text: bool) -> None:
    ran = judge(*judge.files(text=text), "--json")
    assert ran.code == PASS
    assert ran.json["result"] == "pass"
    (device,) = ran.json["devices"]
    assert (device["architecture"], device["driver"], device["vbios"]) == ("hopper", DRIVER, VBIOS)
    assert device["ueid"] == str(GPU.leaf.certificate.serial_number)
    assert device["fwid_matched"] is True
    assert device["measurements"] == {"compared": 32, "mismatched": [], "skipped": [35]}
    assert {"NO_FLOOR", "NO_COUNT", "REVOCATION_UNKNOWN"} == set(ran.json["warnings"])


def test_tells_people_what_was_not_proven(judge: Judge) -> None:
    ran = judge(*judge.files())
    assert ran.code == PASS
    assert "PASS" in ran.out
    assert "floor: none configured" in ran.out
    assert "developer-tools mode" in ran.out
    assert "not NVIDIA's root" in ran.out


def test_refuses_with_the_reason(judge: Judge) -> None:
    ran = judge(*judge.files(), "--nonce", digest("other")[:32].hex(), "--json")
    assert ran.code == REFUSED
    assert ran.json["result"] == "refused"
    assert ran.json["reason"]["slug"] == "NONCE_MISMATCH"
    told = judge(*judge.files(), "--nonce", digest("other")[:32].hex())
    assert told.code == REFUSED
    assert "NONCE_MISMATCH" in told.out


def test_without_reference_values_it_refuses_unless_told_otherwise(judge: Judge) -> None:
    ran = judge(*judge.files(), "--json", rims=False)
    assert (ran.code, ran.json["reason"]["slug"]) == (REFUSED, "NO_RIM")
    assert "--allow-no-rim" in judge(*judge.files(), rims=False).out
    allowed = judge(*judge.files(), "--allow-no-rim", "--json", rims=False)
    assert allowed.code == PASS
    assert "NO_RIM" in allowed.json["warnings"]
    assert allowed.json["devices"][0]["measurements"] is None


def test_an_ampere_is_unverifiable_and_no_pass(judge: Judge) -> None:
    ran = judge(*judge.listed(item(arch="AMPERE")), "--json")
    assert (ran.code, ran.json["result"]) == (REFUSED, "unverifiable")
    assert "UNVERIFIABLE" in judge(*judge.files(), "--arch", "ampere").out


def test_judges_lists_of_devices_together(judge: Judge) -> None:
    good = judge(*judge.listed(item(), item(OTHER, driver=DRIVER)), "--gpus", "2", "--arch", "hopper", "--json")
    assert good.code == PASS
    assert [device["result"] for device in good.json["devices"]] == ["pass", "pass"]
    twice = judge(*judge.listed(item(), item()), "--json")
    assert (twice.code, twice.json["reason"]["slug"]) == (REFUSED, "DUPLICATE_DEVICE")
    few = judge(*judge.listed(item()), "--gpus", "2", "--json")
    assert (few.code, few.json["reason"]["slug"]) == (REFUSED, "WRONG_COUNT")
    lying = judge(*judge.listed(item(driver="1.2")), "--json")
    assert (lying.code, lying.json["reason"]["slug"]) == (REFUSED, "CLAIM_MISMATCH")
    none = judge(*judge.listed(), "--json")
    assert (none.code, none.json["reason"]["slug"]) == (REFUSED, "NO_DEVICES")


def test_judges_a_switch(judge: Judge) -> None:
    ran = judge(*judge.listed(item(SWITCH)), "--min-switch-bios", "96.10.55.00.01", "--json")
    assert ran.code == PASS
    assert ran.json["devices"][0]["kind"] == "switch"


def test_a_baseboard_given_as_two_lists_is_one(judge: Judge) -> None:
    board = [item(each, report=each.report(fields=given)) for each, given in VENDOR.baseboard()]
    gpus = judge.ctl.write("gpus.json", encode_evidence(board[:8]))
    switches = judge.ctl.write("switches.json", encode_evidence(board[8:]))
    assert judge("--evidence", gpus, "--evidence", switches, "--gpus", "8").code == PASS
    alone = judge("--evidence", gpus, "--json")
    assert (alone.code, alone.json["reason"]["slug"]) == (REFUSED, "PPCIE_INCOMPLETE")


def test_floors_refuse_what_is_older(judge: Judge) -> None:
    assert judge(*judge.files(), "--min-driver", DRIVER, "--min-vbios", VBIOS).code == PASS
    ran = judge(*judge.files(), "--min-driver", "580.0", "--json")
    assert (ran.code, ran.json["reason"]["slug"]) == (REFUSED, "BELOW_FLOOR")


def test_revocation_data_are_used(judge: Judge) -> None:
    boot_rom, provisioner = GPU.signers[1:3]
    good = judge.ctl.write("good.ocsp", ocsp_response(boot_rom.certificate, provisioner))
    assert judge(*judge.files(), "--ocsp", good, "--max-age", "1").code == PASS
    assert judge(*judge.files(), "--ocsp", good, "--require-revocation").code == REFUSED
    bad = judge.ctl.write("bad.crl", crl(provisioner, boot_rom.certificate))
    ran = judge(*judge.files(), "--crl", bad, "--json")
    assert (ran.code, ran.json["reason"]["slug"]) == (REFUSED, "CERTIFICATE_REVOKED")


def test_a_store_is_used_as_the_agent_would(judge: Judge) -> None:
    folder = judge.ctl.folder / "store"
    folder.mkdir()
    for number, document in enumerate(VENDOR.rims()):
        (folder / f"{number}.xml").write_bytes(document)
    (folder / "README").write_bytes(b"nothing of the kind")
    store = ["--collateral", str(folder)]
    assert judge(*judge.files(), *store, rims=False).code == PASS
    boot_rom, provisioner = GPU.signers[1:3]
    (folder / "revoked.crl").write_bytes(crl(provisioner, boot_rom.certificate))
    ran = judge(*judge.files(), *store, "--json", rims=False)
    assert (ran.code, ran.json["reason"]["slug"]) == (REFUSED, "CERTIFICATE_REVOKED")
    (folder / "broken.ocsp").write_bytes(b"")
    assert judge(*judge.files(), *store, rims=False).code == USAGE
    assert judge(*judge.files(), "--collateral", f"{folder}/absent").code == USAGE


def test_prints_claims_in_the_shape_of_nvidias_tokens(judge: Judge) -> None:
    overall, devices = judge(*judge.files(), "--eat").json
    assert overall["x-nvidia-overall-att-result"] is True
    assert devices["GPU-0"]["measres"] == "success"


@pytest.mark.parametrize("content", [b"", b"abc", b"{}", b"[1]", b"\xff", b'[{"arch": "HOPPER", "arch": "HOPPER"}]'])
def test_a_list_that_cannot_be_read_is_refused(judge: Judge, content: bytes) -> None:
    ran = judge("--evidence", judge.ctl.write("broken.json", content), "--json")
    assert ran.code == REFUSED
    assert ran.json["result"] == "refused"
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("content", [b"", b"zz", b"11e001f", b"\x11\xe0\x01\xff", b"11 e0 01 ff\n", bytes(100_000)])
def test_a_report_that_cannot_be_read_is_refused(judge: Judge, content: bytes) -> None:
    _, _, *chain = judge.files()
    ran = judge("--report", judge.ctl.write("report", content), *chain, "--json")
    assert ran.code == REFUSED
    assert ran.json["devices"][0]["reason"]["step"] == "gpu.format"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--report", "FILE"],
        ["--report", "FILE", "--chain", "FILE", "--evidence", "FILE"],
        ["--report", "FILE", "--chain", "FILE", "--nonce", "00"],
        ["--report", "FILE", "--chain", "FILE", "--nonce", "xx"],
        ["--report", "FILE", "--chain", "FILE", "--rim", "FILE"],
        ["--report", "FILE", "--chain", "FILE", "--crl", "FILE"],
        ["--report", "FILE", "--chain", "FILE", "--ocsp", "FILE"],
        ["--report", "FILE", "--chain", "FILE", "--device-root", "FILE"],
        ["--report", "FILE", "--chain", "FILE", "--min-driver", "new"],
        ["--report", "FILE", "--chain", "FILE", "--at", "today"],
        ["--report", "FILE", "--chain", "FILE", "--arch", "volta"],
        ["--report", "FILE", "--chain", "FILE", "--json", "--eat"],
        ["--report", "/nowhere", "--chain", "FILE"],
    ],
)
def test_a_bad_argument_is_a_usage_error(judge: Judge, arguments: list[str]) -> None:
    file = judge.ctl.write("file", b"nothing of the kind")
    given = [file if each == "FILE" else each for each in arguments]
    assert judge(*given).code == USAGE


def test_json_is_one_document_whatever_happens(judge: Judge) -> None:
    for arguments in (judge.files(), judge.listed(item(report=b"x")), judge.listed(item(chain=b"x"))):
        assert isinstance(json.loads(judge(*arguments, "--json").out), dict)
