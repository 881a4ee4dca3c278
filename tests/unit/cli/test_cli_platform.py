"""``cgpuctl platform verify``: exit status, JSON, and what a user may hand over."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fixtures.ctl import REFUSED, USAGE, Ctl, Ran
from fixtures.gpupki import pem
from fixtures.platform import AK, AMD, CAS, CLAIMS, SNP, TDX, TRUSTED_LAUNCH

AT = ("--at", "2026-06-01T12:00:00Z")


def verify(ctl: Ctl, *arguments: str) -> Ran:
    return ctl("platform", "verify", *AT, *arguments)


@pytest.fixture
def report(ctl: Ctl) -> list[str]:
    assert SNP.report is not None
    return ["--hcl", ctl.write("hcl.bin", SNP.report), "--vcek", ctl.write("vcek.pem", pem(AMD.certificates))]


def test_refuses_makers_that_nobody_knows(ctl: Ctl, report: list[str]) -> None:
    ran = verify(ctl, *report, "--json")
    assert ran.code == REFUSED
    assert (ran.json["result"], ran.json["endorsed_by"], ran.json["tee"]) == ("refused", "none", "sev-snp")
    assert ran.json["reason"] == "unknown root"
    assert ran.json["claims"]["measurement"] is None
    steps = {step["id"]: step["slug"] for step in ran.json["steps"] if step["outcome"] == "refuse"}
    assert steps == {"snp.chain": "UNKNOWN_ROOT"}


def test_tells_people_that_nobody_vouches(ctl: Ctl, report: list[str]) -> None:
    ran = verify(ctl, *report)
    assert ran.code == REFUSED
    assert "REFUSED: nobody vouches for this vTPM: " in ran.out
    assert "[UNKNOWN_ROOT]" in ran.out


def test_takes_every_kind_of_file(ctl: Ctl) -> None:
    assert TDX.report is not None
    assert TDX.td_quote is not None
    assert TRUSTED_LAUNCH.ak_certificate is not None
    key = AK.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    ak = ["--ak", ctl.write("ak.pem", key)]
    quote = ctl.write("quote.bin", TDX.td_quote)
    ran = verify(ctl, "--hcl", ctl.write("tdx.bin", TDX.report), "--td-quote", quote, *ak, "--json")
    assert (ran.code, ran.json["tee"], ran.json["reason"]) == (REFUSED, "tdx", "unknown root")
    ran = verify(ctl, "--hcl", quote, "--claims", ctl.write("claims.json", CLAIMS), *ak, "--json")
    assert (ran.code, ran.json["tee"], ran.json["reason"]) == (REFUSED, "tdx", "unknown root")
    certificate = ctl.write("ak.der", TRUSTED_LAUNCH.ak_certificate)
    ran = verify(ctl, "--ak-cert", certificate, "--chain", ctl.write("ca.pem", pem(CAS)), *ak, "--json")
    assert (ran.code, ran.json["tee"], ran.json["reason"]) == (REFUSED, "none", "no roots")


@pytest.mark.parametrize("option", ["--vcek", "--chain", "--ak"])
def test_refuses_what_is_no_certificate_or_key(ctl: Ctl, report: list[str], option: str) -> None:
    ran = verify(ctl, *report, option, ctl.write("junk", b"\x30\x03junk"), "--json")
    assert ran.code == REFUSED
    assert ran.json["endorsed_by"] == "none"
    assert ran.json["reason"]["slug"]


def test_the_time_of_judgement_counts(ctl: Ctl, report: list[str]) -> None:
    assert ctl("platform", "verify", "--at", "noon", *report).code == USAGE


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--hcl", "/nonexistent"],
        ["--claims", "/dev/null"],
        ["--hcl", "/dev/null", "--quote", "/dev/null"],
        ["--hcl", "/dev/null", "--signature", "/dev/null"],
        ["--hcl", "/dev/null", "--pcrs", "/dev/null"],
        ["--hcl", "/dev/null", "--nonce", "00"],
    ],
)
def test_bad_arguments_are_the_users_own(ctl: Ctl, arguments: list[str]) -> None:
    assert verify(ctl, *arguments).code == USAGE


@pytest.mark.parametrize("floor", ["microcode", "microcode=", "microcode=a", "cpu=1", "tee-tcb-svn=123", "snp=-1"])
def test_a_floor_needs_a_known_name_and_a_number(ctl: Ctl, report: list[str], floor: str) -> None:
    assert verify(ctl, *report, "--floor", floor).code == USAGE


def test_a_good_floor_is_taken(ctl: Ctl, report: list[str]) -> None:
    floors = ["--floor", "microcode=219", "--floor", "guest-svn=12", "--floor", "tee-tcb-svn=070103"]
    assert verify(ctl, *report, *floors, "--floor", "qe-svn=6").code == REFUSED
