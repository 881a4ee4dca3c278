"""From a TPM that nobody certified to a token: enrol by its EK, serve evidence with the certificate, be judged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.client import Agent
from cgpu_agent.verifier.ekclass import ek_class_of
from cgpu_agent.verifier.keys import key_of
from cgpu_agent.wire.tpm import parse_public_any
from fixtures.daemon import Daemon, booted_daemon
from fixtures.pki import Authority
from fixtures.verifier import AUDIENCE, PATIENCE, Verifier, certify_ek, claims, current_root, fresh_nonce, running

EK_CERTIFICATE_INDEX = 0x01C00002
ACTIVATE = f"""
@id("enrol")
permit (principal, action == CGpu::Action::"boot.activate_credential", resource)
when {{ principal.uid == {os.geteuid()} }};
"""
POLICY = """
@id("all-parts")
permit (principal, action == CGpu::Action::"require", resource == CGpu::Part::"platform");
@id("vendors-tpm")
permit (principal, action == CGpu::Action::"accept", resource == CGpu::Part::"platform")
when { context.endorsement == "tpm-vendor-ek" && !context.simulated };
"""


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verifier]:
    made = Verifier(tmp_path_factory.mktemp("verifier"))
    (made.folder / "policy.cedar").write_text(POLICY)
    made.tables["trust"] += f'\npolicy = "{made.folder}/policy.cedar"'
    with running(made):
        yield made


@pytest.fixture
def agent() -> Iterator[Daemon]:
    """An agent whose callers may activate credentials, before its first enrolment."""
    with booted_daemon() as made:
        made.tables["tpm"] += f'\nak_certificate = "{made.folder}/ak.der"'
        made.grants = ACTIVATE
        made.start()
        yield made


def rsa_ek_certificate(agent: Daemon, authority: Authority) -> bytes:
    with Agent(agent.socket, timeout=PATIENCE) as client:
        return certify_ek(authority, key_of(parse_public_any(client.get_identity().ek_rsa)))


def enrol(agent: Daemon, verifier: Verifier, *more: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cgpu_agent.cli.main", "ak", "enrol", "--socket", agent.socket]
    command += ["--url", f"http://127.0.0.1:{verifier.port}", "-o", str(agent.folder / "ak.der"), *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def given(agent: Daemon, authority: Authority) -> tuple[str, Path]:
    path = agent.folder / "ek.der"
    path.write_bytes(rsa_ek_certificate(agent, authority))
    return "--ek-certificate", path


def token(agent: Daemon, verifier: Verifier) -> dict[str, object]:
    """What the service says of evidence that this agent serves now."""
    with verifier.client() as client, Agent(agent.socket, timeout=PATIENCE) as workload:
        bundle = workload.get_evidence(fresh_nonce(client), AUDIENCE)
        answer = client.post("/v1/verify", content=bundle)
        assert answer.status_code == 200, answer.text
        return claims(client, answer.text)


def platform(found: dict[str, object]) -> dict[str, object]:
    submods = found["submods"]
    assert isinstance(submods, dict)
    return dict(submods["platform"]["cgpu.signed"])


def test_a_certified_ek_makes_an_ak_that_gets_a_token(agent: Daemon, verifier: Verifier) -> None:
    with verifier.client() as client, Agent(agent.socket, timeout=PATIENCE) as workload:
        bundle = workload.get_evidence(fresh_nonce(client), AUDIENCE)
        assert client.post("/v1/verify", content=bundle).json()["slug"] == "UNENDORSED"
    answer = enrol(agent, verifier, *given(agent, verifier.ek_root))
    assert answer.returncode == 0, answer.stderr
    assert "class vendor:ACME" in answer.stdout
    agent.reload()
    found = token(agent, verifier)
    assert platform(found)["endorsement"] == "tpm-vendor-ek"
    assert platform(found)["ek_class"] == "vendor:ACME"
    assert platform(found)["endorsed_by"] == "CN=enrolment CA"
    assert (found["cgpu.simulated"], found["cgpu.status"]) == (False, "warning")
    assert "enrolled" in verifier.journal


def test_the_certificate_travels_from_the_start_on(agent: Daemon, verifier: Verifier) -> None:
    assert enrol(agent, verifier, *given(agent, verifier.operator_root)).returncode == 0
    assert agent.stop() == 0
    agent.start()
    assert platform(token(agent, verifier))["endorsement"] == "operator-ek"


def test_a_simulators_ek_never_makes_more_than_a_simulation(agent: Daemon, verifier: Verifier) -> None:
    assert enrol(agent, verifier, *given(agent, verifier.simulated_root)).returncode == 0
    made = x509.load_der_x509_certificate((agent.folder / "ak.der").read_bytes())
    assert str(ek_class_of(made)) == "simulated"
    agent.reload()
    found = token(agent, verifier)
    assert platform(found)["endorsement"] == "simulated-ek"
    assert (found["cgpu.simulated"], found["cgpu.status"]) == (True, "contraindicated")


def test_the_certificate_in_the_tpm_is_found(verifier: Verifier) -> None:
    with booted_daemon() as agent:
        agent.grants = ACTIVATE
        agent.start()
        der = rsa_ek_certificate(agent, verifier.ek_root)
        agent.stop()
        agent.tpm.provision_nv(EK_CERTIFICATE_INDEX, der, size=1500)
        agent.start()
        assert enrol(agent, verifier).returncode == 0


def test_refuses_an_ek_that_nobody_known_certified(agent: Daemon, verifier: Verifier) -> None:
    answer = enrol(agent, verifier, *given(agent, current_root("nobody")))
    assert answer.returncode == 1
    assert "UNKNOWN_ISSUER" in answer.stderr
    assert not (agent.folder / "ak.der").exists()


def test_refuses_the_certificate_of_another_tpms_ek(agent: Daemon, verifier: Verifier) -> None:
    with booted_daemon() as other:
        other.start()
        foreign = rsa_ek_certificate(other, verifier.ek_root)
    path = agent.folder / "foreign.der"
    path.write_bytes(foreign)
    answer = enrol(agent, verifier, "--ek-certificate", path)
    assert answer.returncode == 2
    assert "EK_CERTIFICATE_MISMATCH" in answer.stderr


def test_needs_a_certificate_and_a_grant(agent: Daemon, verifier: Verifier) -> None:
    assert "NO_EK_CERTIFICATE" in enrol(agent, verifier).stderr
    agent.grants = ""
    agent.configure()
    agent.reload()
    assert "NOT_ALLOWED" in enrol(agent, verifier, *given(agent, verifier.ek_root)).stderr


def test_a_certificate_that_does_not_fit_is_shown_and_not_used(agent: Daemon, verifier: Verifier) -> None:
    foreign = verifier.ak_root.certificate.public_bytes(Encoding.DER)
    (agent.folder / "ak.der").write_bytes(foreign)
    agent.reload()
    with Agent(agent.socket, timeout=PATIENCE) as client:
        assert client.get_identity().platform_ak_certificate is None
    problems = {problem.reason for problem in agent.admin().get_status().problems}
    assert {"AK_CERTIFICATE_MISMATCH", "UNENDORSED"} <= problems
    (agent.folder / "ak.der").write_bytes(b"no certificate")
    agent.reload()
    assert "AK_CERTIFICATE_MISMATCH" not in {problem.reason for problem in agent.admin().get_status().problems}


@pytest.mark.parametrize(
    "url",
    ["http://verifier.example", "ftp://127.0.0.1", "https://a:b@verifier.example", "https://", "http://[::1", "x"],
)
def test_speaks_plainly_to_this_machine_alone(tmp_path: Path, url: str) -> None:
    command = [sys.executable, "-m", "cgpu_agent.cli.main", "ak", "enrol", "--url", url, "-o", str(tmp_path / "ak")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert answer.returncode == 2
    assert "BAD_URL" in answer.stderr
