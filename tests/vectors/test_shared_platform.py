"""Real platform evidence of Azure gives the results computed for it; mixed up, altered or out of its time, none."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.gpuchain import spki_digest
from cgpu_agent.verifier.keys import AttestationKey, load_attestation_key
from cgpu_agent.verifier.platformcase import PlatformEvidence, SnpFloor
from cgpu_agent.verifier.quote import verify_quote
from cgpu_agent.verifier.roots.platform import AMD_ROOTS, AZURE_VTPM_ROOTS, SHIPPED
from cgpu_agent.verifier.teechain import leaf_key, require_ecdsa
from cgpu_agent.wire.hcl import parse_hcl
from cgpu_agent.wire.snp import parse_snp_report
from cgpu_agent.wire.tdx import parse_td_quote
from fixtures.platform import refused
from fixtures.recorded_platform import ENDORSED, FLASHBOTS, SNP, TDX, TVM, WANTED, Azure, day

pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive")


@pytest.fixture
def azure(shared_data: Path) -> Azure:
    return Azure(shared_data / "azure")


@pytest.fixture
def expected(azure: Azure) -> Any:
    return json.loads((azure.root / "expected.json").read_text())


# --- every folder ---


def test_every_folder_of_evidence_has_its_result(azure: Azure) -> None:
    folders = {each.name for each in azure.root.iterdir() if each.is_dir()}
    assert folders - {"roots", "maa", "skr-policies"} == set(WANTED)


@pytest.mark.parametrize("folder", WANTED)
def test_gives_the_result_computed_for_it(azure: Azure, folder: str) -> None:
    wanted = WANTED[folder]
    answer = azure.judge(folder)
    assert (answer.endorsed_by, refused(answer), answer.reason) == (
        wanted.endorsed_by,
        wanted.refusal,
        wanted.reason,
    )
    assert answer.platform_freshness == "boot"


@pytest.mark.parametrize("folder", [*SNP, *TDX])
def test_the_endorsed_ak_signed_the_quote_beside_it(azure: Azure, folder: str) -> None:
    answer = azure.judge(folder)
    assert answer.ak is not None
    message, signature = azure.read(f"{folder}/quote.msg"), azure.read(f"{folder}/quote.sig")
    assert message is not None
    assert signature is not None
    ak = AttestationKey(answer.ak, None)
    assert verify_quote(message, signature, ak, nonce=None, pcrs=azure.pcrs(folder), expected_pcrs=None).accepted


@pytest.mark.parametrize("folder", [name for name in ENDORSED if name not in ("snp-cmcp-20260720", TVM)])
def test_pcr6_follows_from_the_claims(azure: Azure, folder: str) -> None:
    assert azure.judge(folder).passed("platform.pcr6")


def test_reads_the_fields_of_every_snp_report(azure: Azure, expected: Any) -> None:
    seen = 0
    for folder in WANTED:
        wanted, report = expected.get(folder, {}).get("snp"), azure.evidence(folder).report
        if wanted is None or report is None:
            continue
        seen += 1
        found = parse_snp_report(parse_hcl(report).hardware if report[:4] == b"HCLA" else report)
        assert (found.version, found.guest_svn, hex(found.policy), found.vmpl) == (
            wanted["version"],
            wanted["guest_svn"],
            wanted["policy"],
            wanted["vmpl"],
        )
        texts = {
            "chip": found.chip_id,
            "family": found.family_id,
            "hostdata": found.host_data,
            "idkeydigest": found.id_key_digest,
            "image": found.image_id,
            "measurement": found.measurement,
            "report_data": found.report_data,
            "reported_tcb": found.reported_tcb,
        }
        assert {name: value.hex() for name, value in texts.items()} == {name: wanted[name] for name in texts}
    assert seen == 5


def test_the_containers_report_is_genuine_and_is_of_no_paravisor(azure: Azure) -> None:
    answer = azure.judge("aci-snp-sidecar")
    assert answer.passed("snp.chain")
    assert answer.passed("snp.signature")
    data, policy = (
        azure.read("aci-snp-sidecar/snp_report.bin"),
        azure.read("aci-snp-sidecar/uvm_security_policy.base64"),
    )
    assert data is not None
    assert policy is not None
    assert parse_snp_report(data).host_data == hashlib.sha256(base64.b64decode(policy)).digest()


@pytest.mark.parametrize("name", ["td_quote_v4.dat", "td_quote_v5.dat"])
def test_quotes_of_both_versions_are_genuine(azure: Azure, name: str) -> None:
    answer = azure.judge("td-quotes", PlatformEvidence(azure.read(f"td-quotes/{name}")))
    for step in ("tdx.quote", "tdx.chain", "tdx.enclave", "tdx.key", "tdx.signature", "tdx.attributes", "tdx.module"):
        assert answer.passed(step), step
    data = azure.read(f"td-quotes/{name}")
    assert data is not None
    offset = 568 if name == "td_quote_v4.dat" else 574
    body = parse_td_quote(data).body
    assert body.report_data == data[offset : offset + 64]
    assert not any(body.report_data[32:])


def test_published_roots_hold_the_pinned_keys(azure: Azure) -> None:
    for product in ("milan", "genoa", "turin"):
        assert AMD_ROOTS[spki_digest(azure.amd(product)[1])] == product
    (root,) = azure.certificates("roots/azure-virtual-tpm-root-2023.pem")
    assert spki_digest(root) in AZURE_VTPM_ROOTS
    assert root.subject.rfc4514_string().startswith("CN=Azure Virtual TPM Root Certificate Authority 2023")
    assert (root.not_valid_before_utc.date(), root.not_valid_after_utc.date()) == (
        day("2023-06-01").date(),
        day("2048-06-01").date(),
    )


def test_reports_of_today_meet_the_floor_of_their_firmware_and_older_ones_do_not(azure: Azure) -> None:
    floor = {"snp_floor": SnpFloor(bootloader=4, snp=24, microcode=219, guest_svn=10)}
    for folder in SNP:
        assert azure.judge(folder, party=floor).passed("snp.floor")
    higher = {"snp_floor": SnpFloor(guest_svn=13)}
    for folder in SNP:
        assert refused(azure.judge(folder, party=higher)) == ("snp.floor", "BELOW_FLOOR")


# --- what must fail ---


def test_a_report_is_not_signed_by_the_key_of_another_chip(azure: Azure) -> None:
    folder = "snp-milan-kinvolk-hcl"
    answer = azure.judge(folder)
    assert answer.passed("platform.binding")
    assert answer.passed("snp.chain")
    data = azure.read(f"{folder}/hcl_report.bin")
    assert data is not None
    report = parse_snp_report(parse_hcl(data).hardware)
    vcek = azure.certificates(f"{folder}/certs.pem")[0]
    with pytest.raises(HostileInput) as caught:
        require_ecdsa(leaf_key(vcek, "secp384r1"), report.r, report.s, report.signed, "it")
    assert caught.value.slug == "BAD_SIGNATURE"


def test_refuses_the_claims_of_another_vm(azure: Azure) -> None:
    data, other = azure.read("snp-milan-kinvolk-hcl/hcl_report.bin"), azure.read("snp-milan-kinvolk-hcl/var-data.bin")
    assert data is not None
    answer = azure.judge("snp-milan-kinvolk-hcl", PlatformEvidence(parse_hcl(data).hardware, other))
    assert refused(answer) == ("platform.binding", "REPORT_DATA_MISMATCH")


@pytest.mark.parametrize("folder", [*SNP, "snp-milan-kinvolk-hcl", *TDX])
def test_refuses_claims_that_were_written_anew(azure: Azure, folder: str) -> None:
    evidence = azure.evidence(folder)
    assert evidence.report is not None
    claims, bare = evidence.claims, evidence.report
    if claims is None:
        parsed = parse_hcl(evidence.report)
        claims = parsed.claims
        bare = parsed.hardware if folder in SNP or folder.startswith("snp") else evidence.td_quote or b""
    anew = json.dumps(json.loads(claims), sort_keys=True).encode()
    given = replace(evidence, report=bare, td_quote=None)
    assert azure.judge(folder, replace(given, claims=claims)).passed("platform.binding")
    answer = azure.judge(folder, replace(given, claims=anew))
    assert refused(answer) == ("platform.binding", "REPORT_DATA_MISMATCH")


@pytest.mark.parametrize("product", ["genoa", "turin"])
@pytest.mark.parametrize("folder", ["snp-milan-trustee-v0", "snp-milan-trustee-v1"])
def test_a_milan_chip_finds_no_root_of_another_product(azure: Azure, folder: str, product: str) -> None:
    evidence = azure.evidence(folder)
    evidence = replace(evidence, certificates=(evidence.certificates[0], *azure.amd(product)))
    assert refused(azure.judge(folder, evidence)) == ("snp.chain", "UNKNOWN_ISSUER")


def test_milan_is_not_believed_where_only_other_products_are(azure: Azure) -> None:
    others = {key: product for key, product in AMD_ROOTS.items() if product != "milan"}
    party = {"pins": replace(SHIPPED, amd_roots=others)}
    assert refused(azure.judge("snp-milan-trustee-v0", party=party)) == ("snp.chain", "UNKNOWN_ROOT")


def test_refuses_every_report_under_the_chip_of_another(azure: Azure) -> None:
    chips = {folder: azure.evidence(folder).certificates for folder in (*SNP, "aci-snp-sidecar")}
    for folder in SNP:
        for other, certificates in chips.items():
            if certificates[0] == chips[folder][0]:
                continue
            answer = azure.judge(folder, replace(azure.evidence(folder), certificates=certificates))
            later = azure.judge(
                folder, replace(azure.evidence(folder), certificates=certificates), at=day("2026-08-01")
            )
            assert answer.endorsed_by == "none", other
            assert refused(later) == ("snp.chip", "CHIP_MISMATCH"), other


def test_refuses_every_td_quote_under_the_report_of_another(azure: Azure) -> None:
    quotes = [azure.read(f"{folder}/td_quote.bin") for folder in TDX]
    quotes += [azure.read("td-quotes/td_quote_v4.dat"), azure.read("td-quotes/td_quote_v5.dat")]
    for folder in [*TDX, "tdx-kinvolk-hcl"]:
        own = azure.evidence(folder)
        for quote in quotes:
            if quote != own.td_quote:
                answer = azure.judge(folder, replace(own, td_quote=quote))
                assert refused(answer) == ("tdx.match", "QUOTE_MISMATCH")


def test_refuses_the_pcrs_and_the_ak_of_another_vm(azure: Azure) -> None:
    for folder, other in ((SNP[1], TDX[0]), (TDX[0], TDX[1]), (TDX[1], SNP[2])):
        assert refused(azure.judge(folder, pcrs=azure.pcrs(other))) == ("platform.pcr6", "PCR6_MISMATCH")
        ak = azure.judge(other).ak
        assert refused(azure.judge(folder, ak=ak)) == ("platform.ak", "AK_MISMATCH")


@pytest.mark.parametrize("folder", [name for name in (*SNP, *TDX) if name != "snp-cmcp-20260720"])
def test_refuses_a_tail_that_is_not_zero(azure: Azure, folder: str) -> None:
    evidence = azure.evidence(folder)
    assert evidence.report is not None
    for report in (evidence.report[:-1] + b"\1", evidence.report + b"\1"):
        answer = azure.judge(folder, replace(evidence, report=report))
        assert refused(answer) == ("platform.format", "TRAILING_BYTES")


def flips(data: bytes, samples: int = 60) -> list[bytes]:
    step = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "campaign" else max(1, len(data) // samples)
    return [data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :] for at in range(0, len(data), step)]


@pytest.mark.parametrize("folder", SNP)
def test_no_byte_of_an_snp_report_may_change(azure: Azure, folder: str) -> None:
    evidence = azure.evidence(folder)
    assert evidence.report is not None
    for report in flips(evidence.report):
        answer = azure.judge(folder, replace(evidence, report=report))
        assert answer.endorsed_by == "none"
        assert answer.refusal is not None
        assert answer.refusal.slug != "INTERNAL"


@pytest.mark.parametrize("folder", TDX)
def test_no_byte_that_counts_in_a_td_quote_may_change(azure: Azure, folder: str) -> None:
    evidence = azure.evidence(folder)
    assert evidence.td_quote is not None
    good = parse_td_quote(evidence.td_quote)
    for quote in flips(evidence.td_quote):
        answer = azure.judge(folder, replace(evidence, td_quote=quote))
        if answer.endorsed_by != "none":  # another encoding of the same certificates
            assert replace(parse_td_quote(quote), certificates=b"") == replace(good, certificates=b"")
        else:
            assert answer.refusal is not None
            assert answer.refusal.slug != "INTERNAL"


@pytest.mark.parametrize("folder", ENDORSED)
def test_refuses_outside_of_the_time_of_its_certificates(azure: Azure, folder: str) -> None:
    path = azure.judge(folder).facts.path
    assert path is not None
    last = path.not_after if folder != FLASHBOTS else day("2026-11-30")
    late = azure.judge(folder, at=last + timedelta(days=1))
    assert late.refusal is not None
    assert late.refusal.slug == "CERTIFICATE_EXPIRED"
    early = azure.judge(folder, at=day("2020-01-01"))
    assert early.refusal is not None
    assert early.refusal.slug == "CERTIFICATE_NOT_YET_VALID"


# --- Trusted Launch ---


def test_the_certificate_of_the_platform_ak_does_not_vouch_for_an_ak_made_in_the_guest(azure: Azure) -> None:
    data = azure.read(f"{TVM}/ak.pub")
    assert data is not None
    answer = azure.judge(TVM, ak=load_attestation_key(data).key)
    assert refused(answer) == ("platform.certificate", "AK_CERTIFICATE_MISMATCH")


def test_the_certificate_of_a_trusted_vm_holds_within_its_year_only(azure: Azure) -> None:
    for at, outcome in (
        ("2026-07-27", None),
        ("2027-04-21", None),
        ("2027-04-25", ("platform.certificate", "CERTIFICATE_EXPIRED")),
    ):
        assert refused(azure.judge(TVM, at=day(at))) == outcome
    assert azure.judge(TVM).trusted.startswith("cloud operator trusted")


@pytest.mark.parametrize(
    ("names", "slug"),
    [
        ((), "NO_ROOTS"),
        (("roots/global-virtual-tpm-ca-03.pem",), "NO_ROOTS"),
        (("roots/azure-virtual-tpm-root-2023.pem",), "UNKNOWN_ISSUER"),
        (("roots/global-virtual-tpm-ca-03.pem", "roots/microsoft-rsa-devices-root-ca-2021.pem"), "NO_ROOTS"),
    ],
)
def test_refuses_an_ak_certificate_without_its_authorities(azure: Azure, names: tuple[str, ...], slug: str) -> None:
    for folder in (TVM, FLASHBOTS):
        evidence = replace(azure.evidence(folder), ca_certificates=azure.certificates(*names))
        assert refused(azure.judge(folder, evidence)) == ("platform.certificate", slug)


# --- the command line ---


def cgpuctl(azure: Azure, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a process of its own, where a warning would land on the user's terminal."""
    code = "import sys; from cgpu_agent.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "default", "-c", code, "platform", "verify", "--json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=azure.root, timeout=60)


def test_the_command_line_says_who_vouches(azure: Azure) -> None:
    milan = "roots/amd_ask_ark_milan.pem"
    root = ["--chain", "roots/global-virtual-tpm-ca-03.pem", "--chain", "roots/azure-virtual-tpm-root-2023.pem"]
    snp, tdx = "snp-milan-trustee-v0", "tdx-trustee-v1"
    cmcp = "snp-cmcp-20260720"
    for arguments, endorsed_by in (
        (["--hcl", f"{snp}/hcl_report.bin", "--vcek", f"{snp}/vcek.pem", "--vcek", milan], "amd-sev-snp"),
        (["--hcl", f"{tdx}/hcl_report.bin", "--td-quote", f"{tdx}/td_quote.bin"], "intel-tdx"),
        (
            ["--ak-cert", f"{TVM}/akcert_0x01C101D0.der", *root, "--at", "2026-08-01T00:00:00Z"],
            "azure-trusted-launch",
        ),
        (
            [
                *("--hcl", f"{cmcp}/snp_report.bin", "--claims", f"{cmcp}/runtime_data.json"),
                *("--vcek", f"{cmcp}/vcek_ask_ark.pem", "--ak", f"{cmcp}/akpub.pem"),
                *("--floor", "microcode=219", "--floor", "guest-svn=12", "--at", "2026-08-01T00:00:00Z"),
            ],
            "amd-sev-snp",
        ),
    ):
        at = [] if "--at" in arguments else ["--at", "2025-12-02T00:00:00Z"]
        ran = cgpuctl(azure, *arguments, *at)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert json.loads(ran.stdout)["endorsed_by"] == endorsed_by
        assert json.loads(ran.stdout)["result"] == "pass"


V0, V1, TRUSTEE_TD = "snp-milan-trustee-v0", "snp-milan-trustee-v1", "tdx-trustee-v1"
CHALLENGE = b"challenge".hex()


def with_quote(
    azure: Azure, platform: list[str], quote: str, *, pcrs: str | None = None, nonce: str | None = CHALLENGE
) -> dict[str, Any]:
    """The verdict on a platform beside the quote of some folder."""
    files = ["--quote", f"{quote}/quote.msg", "--signature", f"{quote}/quote.sig"]
    files += ["--pcrs", f"{quote if pcrs is None else pcrs}/pcrs_sha256.json"]
    files += [] if nonce is None else ["--nonce", nonce]
    ran = cgpuctl(azure, *platform, *files, "--at", "2025-12-02T00:00:00Z")
    assert ran.stderr == ""
    found: dict[str, Any] = json.loads(ran.stdout)
    assert (found["result"] == "pass") == (ran.returncode == 0)
    return found


SNP_FILES = ["--hcl", f"{V0}/hcl_report.bin", "--vcek", f"{V0}/vcek.pem", "--chain", "roots/amd_ask_ark_milan.pem"]
TDX_FILES = ["--hcl", f"{TRUSTEE_TD}/hcl_report.bin", "--td-quote", f"{TRUSTEE_TD}/td_quote.bin"]


@pytest.mark.parametrize(
    ("platform", "quote"), [(SNP_FILES, V0), (SNP_FILES, V1), (TDX_FILES, TRUSTEE_TD)], ids=["snp", "same VM", "tdx"]
)
def test_a_quote_by_the_endorsed_ak_passes(azure: Azure, platform: list[str], quote: str) -> None:
    found = with_quote(azure, platform, quote)
    assert found["result"] == "pass"
    steps = {step["id"]: step["outcome"] for step in found["steps"]}
    assert steps["platform.pcr6"] == "pass"


@pytest.mark.parametrize(
    ("platform", "quote", "changed", "refused"),
    [
        (SNP_FILES, TRUSTEE_TD, {}, "quote.signature"),
        (TDX_FILES, V0, {}, "quote.signature"),
        (SNP_FILES, FLASHBOTS, {"nonce": None}, "quote.signature"),
        (SNP_FILES, "snp-milan-kinvolk-quote", {}, "quote.signature"),
        (SNP_FILES, TVM, {}, "quote.signature"),
        (SNP_FILES, V0, {"nonce": "00"}, "quote.nonce"),
        (SNP_FILES, V0, {"pcrs": TRUSTEE_TD}, "quote.digest"),
    ],
    ids=["TD's", "SNP's", "another TD's", "another SNP VM's", "Trusted Launch's", "other nonce", "other PCRs"],
)
def test_a_quote_of_another_machine_does_not(
    azure: Azure, platform: list[str], quote: str, changed: dict[str, Any], refused: str
) -> None:
    found = with_quote(azure, platform, quote, **changed)
    assert found["result"] == "refused"
    assert found["endorsed_by"] != "none"
    assert [step["id"] for step in found["quote"]["steps"] if step["outcome"] == "refuse"] == [refused]


def test_an_ak_made_in_a_trusted_vm_is_not_the_one_that_azure_certified(azure: Azure) -> None:
    platform = ["--ak-cert", f"{TVM}/akcert_0x01C101D0.der", "--chain", "roots/global-virtual-tpm-ca-03.pem"]
    platform += ["roots/azure-virtual-tpm-root-2023.pem"]
    files = ["--quote", f"{TVM}/quote.msg", "--signature", f"{TVM}/quote.sig", "--at", "2026-08-01T00:00:00Z"]
    ran = cgpuctl(azure, *platform, *files)
    found = json.loads(ran.stdout)
    assert (ran.returncode, found["result"], found["endorsed_by"]) == (1, "refused", "azure-trusted-launch")
    ran = cgpuctl(azure, *platform, *files, "--ak", f"{TVM}/ak.pub")
    assert (ran.returncode, json.loads(ran.stdout)["endorsed_by"]) == (1, "none")
