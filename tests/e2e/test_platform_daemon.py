"""The real daemon on a vTPM as Azure has it, and what cgpuctl in the VM and offline makes of its platform."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.backends.platform.store import CERTIFICATES, TD_QUOTE
from cgpu_agent.client import Agent
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.evidence import EvidenceResult, RelyingParty, verify_evidence
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.platform import PlatformEndorsement, endorse_platform
from cgpu_agent.verifier.platformcase import PlatformEvidence
from cgpu_agent.wire.hcl import parse_hcl
from fixtures.azure_tpm import AzureTpm, Manners, azure_tpm
from fixtures.ctl import PASS, REFUSED, USAGE, Ctl
from fixtures.daemon import Daemon, booted_daemon
from fixtures.imds import metadata_service, quote_answer
from fixtures.lanes import AZURE_LOG
from fixtures.machine import AUDIENCE
from fixtures.pki import NOW
from fixtures.platform import AMD, AZURE, AZURE_CA, CAS, PARTY, VM_ID

pytestmark = pytest.mark.swtpm


@contextmanager
def azure_daemon(**manners: object) -> Iterator[tuple[Daemon, AzureTpm]]:
    """A daemon that serves on an Azure VM; its store is the folder's."""
    with (
        booted_daemon(AZURE_LOG) as agent,
        azure_tpm(agent.tpm, Manners(**manners)) as (azure, path),  # type: ignore[arg-type]
    ):
        agent.configure()
        text = agent.config.read_text().replace(str(agent.tpm.data_socket), str(path))
        agent.config.write_text(f'{text}[platform]\ncollateral = "{agent.folder}/platform"\n')
        agent.start()
        yield agent, azure


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(tmp_path, capsys)


def judged(folder: Path) -> PlatformEndorsement:
    """The files that ``platform show --out`` wrote, by a relying party that knows the test's makers."""

    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.exists() else None

    chip = read("vcek.pem")
    evidence = PlatformEvidence(
        report=read("report.bin"),
        td_quote=read("td-quote.bin"),
        certificates=() if chip is None else load_certificates(chip),
        ak_certificate=read("ak-certificate.der"),
        ca_certificates=CAS,
    )
    return endorse_platform(evidence, PARTY, ak=load_attestation_key(read("ak.bin") or b"").key)


def test_a_confidential_vm_from_nothing_to_a_judgement(ctl: Ctl, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with azure_daemon() as (agent, azure), metadata_service() as url:
        socket = ["--socket", agent.socket]
        before = ctl("platform", "show", *socket, "--json").json
        assert "platform-certificates" in before["missing"]
        fetched = ctl("platform", "fetch", *socket, "--store", f"{agent.folder}/platform", "--metadata-service", url)
        assert fetched.code == PASS, fetched.err
        shown = ctl("platform", "show", *socket, "--out", str(out), "--json").json
        told = ctl("platform", "show", *socket).out
        assert azure.writes == [], "looking changes nothing"
        with agent.client() as client:
            assert client.get_identity().platform_ak_certificate == azure.certificate
    assert shown["kind"] == "azure-cvm-snp"
    assert shown["missing"] == {}
    assert shown["reported"]["vm_unique_id"] == VM_ID.lower()
    assert shown["reported"]["secure_boot"] is True
    assert shown["reported"]["debug"] is False
    assert [each["subject"] for each in shown["certificates"]] == ["CN=SEV-VCEK", "CN=SEV-milan", "CN=ARK-milan"]
    assert "ConfidentialVM" in shown["ak_certificate"]["subject"]
    assert shown["ak_name"] in told
    assert "SEV-VCEK" in told
    assert "no evidence" in told
    answer = judged(out)
    assert answer.endorsed_by == "amd-sev-snp"
    assert answer.passed("platform.certificate")
    # The built-in pins know neither this AMD nor this paravisor.
    files = ["--report", f"{out}/report.bin", "--vcek", f"{out}/vcek.pem", "--ak", f"{out}/ak.bin"]
    assert ctl("platform", "verify", *files).code == REFUSED


def test_a_td_gets_its_quote(ctl: Ctl, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        azure_daemon(tee="tdx") as (agent, azure),
        metadata_service(quote=lambda report: quote_answer(azure.td_quote(report))) as url,
    ):
        socket, store = ["--socket", agent.socket], f"{agent.folder}/platform"
        assert ctl("platform", "fetch", *socket, "--store", store, "--metadata-service", url).code == PASS
        shown = ctl("platform", "show", *socket, "--out", str(out), "--json").json
    assert (shown["kind"], shown["td_quote"], shown["missing"]) == ("azure-cvm-tdx", True, {})
    assert judged(out).endorsed_by == "intel-tdx"


def test_a_quote_over_another_report_is_not_kept(ctl: Ctl) -> None:
    with (
        azure_daemon(tee="tdx") as (agent, azure),
        metadata_service(quote=lambda _: quote_answer(azure.td_quote(bytes(1024)))) as url,
    ):
        store = Path(agent.folder) / "platform"
        ran = ctl("platform", "fetch", "--socket", agent.socket, "--store", str(store), "--metadata-service", url)
        assert not (store / TD_QUOTE).exists()
    assert ran.code == REFUSED
    assert "QUOTE_MISMATCH" in ran.err


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b"http://127.0.0.1:1/elsewhere", b"x" * 100_000])
def test_what_the_host_answers_is_checked_before_it_is_kept(ctl: Ctl, answer: bytes) -> None:
    with azure_daemon() as (agent, _), metadata_service(lambda: answer) as url:
        store = Path(agent.folder) / "platform"
        ran = ctl("platform", "fetch", "--socket", agent.socket, "--store", str(store), "--metadata-service", url)
        assert not (store / CERTIFICATES).exists()
    assert ran.code == REFUSED


def test_trusted_launch_needs_nothing_and_shows_its_certificate(ctl: Ctl, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.bin").write_bytes(b"of another VM")
    with azure_daemon(tee=None) as (agent, _):
        socket = ["--socket", agent.socket]
        mixed = ctl("platform", "show", *socket, "--out", str(old))
        shown = ctl("platform", "show", *socket, "--out", str(out), "--json").json
        fetched = ctl("platform", "fetch", *socket, "--store", str(tmp_path / "store"))
    assert (shown["kind"], shown["reported"]) == ("azure-trusted-launch", None)
    assert "NOTHING_TO_FETCH" in fetched.err
    assert (mixed.code, "another report" in mixed.err) == (USAGE, True)
    assert judged(out).endorsed_by == "azure-trusted-launch"


def test_a_tpm_alone_is_plain(daemon: Daemon, ctl: Ctl) -> None:
    shown = ctl("platform", "show", "--socket", daemon.socket, "--json").json
    assert (shown["kind"], shown["certificates"], shown["ak_certificate"]) == ("plain", [], None)
    assert "platform-report" in shown["missing"]


def test_a_broken_report_is_an_error_that_says_what_it_is(ctl: Ctl) -> None:
    with azure_daemon(cut=1000) as (agent, _):
        ran = ctl("platform", "show", "--socket", agent.socket)
        with agent.client() as client:
            assert client.get_quote(bytes(16)).attest, "it is no reason to serve nothing"
    assert ran.code == REFUSED
    assert "HCL report" in ran.err


def test_the_metadata_service_is_asked_in_plain_http_only(ctl: Ctl, daemon: Daemon) -> None:
    ran = ctl("platform", "fetch", "--socket", daemon.socket, "--metadata-service", "file:///etc/passwd")
    assert ran.code == USAGE


def workload(socket: str, nonce: bytes) -> bytes:
    """The same three lines wherever it runs: it knows nothing of the platform."""
    with Agent(socket) as agent:
        return agent.get_evidence(nonce, audience=AUDIENCE)


def judged_bundle(**manners: object) -> EvidenceResult:
    """What a relying party that knows the test's makers finds out of a VM with such a platform."""
    nonce = secrets.token_bytes(32)
    with azure_daemon(**manners) as (agent, azure):
        store = Path(agent.folder) / "platform"
        store.mkdir()
        pem = b"".join(each.public_bytes(Encoding.PEM) for each in AMD.certificates)
        (store / CERTIFICATES).write_bytes(pem)
        if manners.get("tee") == "tdx":
            report = parse_hcl(azure.report or b"").hardware
            (store / TD_QUOTE).write_bytes(azure.td_quote(report))
        bundle = workload(agent.socket, nonce)
    party = RelyingParty(AUDIENCE, nonce, NOW, roots=(AZURE.certificate,), intermediates=(AZURE_CA.certificate,))
    return verify_evidence(bundle, replace(party, platform_party=PARTY))


def test_one_workload_runs_unchanged_on_both_generations_and_only_the_endorsement_differs() -> None:
    found = {
        "azure-trusted-launch": judged_bundle(tee=None),
        "amd-sev-snp": judged_bundle(tee="snp"),
        "intel-tdx": judged_bundle(tee="tdx"),
    }
    for endorsed_by, result in found.items():
        assert result.accepted, result.refusal
        assert result.endorsement is not None
        assert result.endorsement.kind == endorsed_by
    others = [
        [(step.id, step.outcome, step.slug) for step in result.steps if step.id != "platform.report"]
        for result in found.values()
    ]
    assert others[0] == others[1] == others[2]
    freshness = [result.hardware.platform_freshness for result in found.values() if result.hardware is not None]
    assert freshness == ["this-batch", "boot"]


@pytest.mark.parametrize("manners", [{"late": None}, {"refuse_writes": True}], ids=["never renewed", "not writable"])
def test_a_report_that_cannot_be_renewed_is_told_as_old(manners: dict[str, object]) -> None:
    result = judged_bundle(tee="snp", **manners)
    assert result.accepted, result.refusal
    assert result.hardware is not None
    assert result.hardware.platform_freshness == "boot"
    assert result.manifest is not None
    assert "platform-freshness" in dict(result.manifest.missing)


def test_a_report_about_another_vtpm_is_no_endorsement_whatever_the_certificate() -> None:
    refusal = judged_bundle(tee="snp", other_ak=True).refusal
    assert refusal is not None
    assert (refusal.id, refusal.slug) == ("platform.report", "AK_MISMATCH")
