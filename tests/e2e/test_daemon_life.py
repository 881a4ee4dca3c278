"""Start, reload, stop, crash, start again: nothing is lost, nothing is half done, and every state has its words."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent.api.v1 import admin_pb2
from cgpu_agent.client import Agent
from cgpu_agent.client.lease import LeasedMemory
from cgpu_agent.errors import AgentError, Denied, Unavailable
from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.wire import cel
from fixtures.daemon import Daemon, booted_daemon
from fixtures.machine import AUDIENCE, judge
from fixtures.policies import permit

pytestmark = pytest.mark.swtpm

MEASURE = permit("boot.measure", f"principal.uid == {os.geteuid()}")


@pytest.fixture
def stopped() -> Iterator[Daemon]:
    """A daemon that was not started."""
    with booted_daemon() as agent:
        yield agent


def evidence(daemon: Daemon) -> EvidenceResult:
    nonce = secrets.token_bytes(32)
    with daemon.client() as agent:
        result = judge(agent.get_evidence(nonce, AUDIENCE), nonce)
    assert result.accepted, result.refusal
    return result


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cgpu_agent.daemon", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


# -- start


def test_ready_comes_after_serving(daemon: Daemon) -> None:
    lines = daemon.manager.lines
    assert lines[0] == "STATUS=Starting"
    assert lines[lines.index("READY=1") - 1].startswith("STATUS=Serving: ")
    assert stat.S_IMODE(Path(daemon.socket).stat().st_mode) == 0o666
    assert stat.S_IMODE((daemon.folder / "private").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "named"),
    [("nonsense = 1\n", "nonsense"), ("[tpm]\nregister = 16\n", "tpm.register"), ("x = [", "config.toml")],
)
def test_bad_configuration_ends_with_status_2_and_says_what_is_wrong(stopped: Daemon, text: str, named: str) -> None:
    stopped.configure(text)
    stopped.start(ready=False)
    assert stopped.process is not None
    assert stopped.process.wait(60) == 2
    assert named in stopped.manager.status
    assert any(line.startswith("<3>bad configuration") and named in line for line in stopped.journal)
    assert "READY=1" not in stopped.manager.lines


def test_check_judges_the_file_and_touches_nothing(stopped: Daemon) -> None:
    stopped.configure()
    good = run("--check", "-c", str(stopped.config))
    assert (good.returncode, good.stdout) == (0, f"{stopped.config}: good\n")
    stopped.configure("[tpm]\ndevice = '/dev/tpmrm0'\n")
    bad = run("--check", "-c", str(stopped.config))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "tpm.device" in bad.stderr
    assert not Path(stopped.socket).exists()
    assert not (stopped.folder / "private").exists()


def test_version_and_absent_file() -> None:
    assert run("--version").stdout.startswith("cgpu-agent ")
    assert run("--config", "/nonexistent").returncode == 2


def test_open_state_directory_ends_the_start_with_status_1(stopped: Daemon) -> None:
    (stopped.folder / "private").mkdir(mode=0o755)
    stopped.start(ready=False)
    assert stopped.process is not None
    assert stopped.process.wait(60) == 1
    assert "0700" in stopped.manager.status


def test_second_daemon_at_the_same_socket_gives_way(daemon: Daemon) -> None:
    second = run("-c", str(daemon.config))
    assert second.returncode == 1
    assert "SOCKET_IN_USE" in second.stderr
    evidence(daemon)


def test_daemon_that_cannot_go_on_says_so_without_the_exceptions_text(stopped: Daemon) -> None:
    stopped.configure()
    (stopped.folder / "private").mkdir(mode=0o700)
    (stopped.folder / "private" / "a").write_text("in the way")
    stopped.start(ready=False)
    assert stopped.process is not None
    assert stopped.process.wait(60) == 1
    (line,) = [line for line in stopped.journal if "failed" in line]
    assert "error=FileExistsError" in line
    assert not any("Traceback" in line for line in stopped.journal)


# -- socket activation


def listener(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    sock.listen(16)
    return sock


def test_call_that_waits_at_systemds_socket_is_answered_after_the_start(stopped: Daemon) -> None:
    with (
        listener(stopped.socket) as api,
        listener(stopped.admin_socket) as admin,
        listener(stopped.lease_socket, socket.SOCK_SEQPACKET) as lease,
    ):
        answers: list[bytes] = []

        def early() -> None:
            with stopped.client() as agent:
                answers.append(agent.get_evidence(bytes(16), AUDIENCE))

        caller = threading.Thread(target=early)
        caller.start()
        stopped.start(listeners=[("admin", admin), ("lease", lease), ("api", api)])
        caller.join(60)
        assert judge(answers[0], bytes(16)).accepted
        assert stopped.admin().get_status().status_line.startswith("Serving")
        assert stopped.stop() == 0
        # systemd's sockets stay: the next caller waits instead of failing.
        assert Path(stopped.socket).exists()
        assert Path(stopped.lease_socket).exists()
        stopped.start(listeners=[("api", api), ("admin", admin), ("lease", lease)])
        evidence(stopped)
        with Path(__file__).open("rb") as source, pytest.raises(Denied):
            LeasedMemory(stopped.lease_socket, 1, source, 60)


@pytest.mark.parametrize("name", ["web", "unknown", ""])
def test_socket_of_another_name_is_a_bad_configuration(stopped: Daemon, name: str) -> None:
    with listener(stopped.socket) as api:
        stopped.start(ready=False, listeners=[(name, api)])
        assert stopped.process is not None
        assert stopped.process.wait(60) == 2


# -- reload


def test_grant_takes_effect_with_a_reload_and_is_measured(daemon: Daemon) -> None:
    pid, before = daemon.pid, evidence(daemon)
    with daemon.client() as agent:
        with pytest.raises(Denied):
            agent.measure_event(b"early")
        daemon.grants = MEASURE
        daemon.configure()
        daemon.reload()
        assert agent.measure_event(b"late").sequence == 3
        daemon.grants = ""
        daemon.configure()
        daemon.reload()
        with pytest.raises(Denied):
            agent.measure_event(b"too late")
    after = evidence(daemon)
    assert daemon.pid == pid
    assert before.manifest is not None
    assert after.manifest is not None
    assert after.manifest.agent["policy"] == before.manifest.agent["policy"]
    assert [b"agent-reload" in record.content for record in after.records] == [False, False, True, False, True]
    lines = daemon.manager.lines
    assert lines[lines.index("RELOADING=1") + 1].startswith("MONOTONIC_USEC=")


def test_bad_policy_on_reload_keeps_the_old_one_and_shows(daemon: Daemon) -> None:
    daemon.grants = MEASURE
    daemon.configure()
    daemon.reload()
    for bad, said in (
        (
            '@id("x") permit(principal, action, resource) when { principal.nonsense };',
            "policy x: attribute `nonsense`",
        ),
        ("(" * 100_000, "nested deeper"),
        (None, "cannot be read"),
    ):
        if bad is None:
            daemon.policy.unlink()
        else:
            daemon.policy.write_text(bad)
        daemon.reload()
        assert daemon.shows(said)
        assert daemon.manager.status.startswith("Serving")
        with daemon.client() as agent:
            assert agent.measure_event(b"by the old policy").pcr == 13
    assert sum(b"agent-reload" in record.content for record in evidence(daemon).records) == 1
    daemon.configure()
    daemon.reload()
    assert "policy" not in daemon.manager.status


def test_bad_policy_keeps_the_daemon_from_starting(stopped: Daemon) -> None:
    stopped.configure()
    stopped.policy.unlink()
    stopped.start(ready=False)
    assert stopped.process is not None
    assert stopped.process.wait(60) == 2
    assert any(f"{stopped.policy} cannot be read" in line for line in stopped.journal)


def test_evidence_states_the_digest_of_the_policy_text(daemon: Daemon) -> None:
    manifest = evidence(daemon).manifest
    assert manifest is not None
    assert manifest.agent["policy"] == hashlib.sha256(daemon.policy.read_bytes()).hexdigest()


def test_denial_names_what_decided(daemon: Daemon) -> None:
    daemon.grants = MEASURE + '@id("never") forbid(principal, action == CGpu::Action::"boot.measure", resource);'
    daemon.configure()
    daemon.reload()
    with daemon.client() as agent:
        with pytest.raises(Denied, match="forbidden by policy never"):
            agent.measure_event(b"x")
        with pytest.raises(Denied, match="no policy allows this"):
            agent.get_raw_quote(bytes(32))


def test_policy_sees_the_state_of_the_machine(daemon: Daemon) -> None:
    daemon.grants = permit("boot.measure", 'context.boot.boot_log && context.boot.state == "degraded"') + permit(
        "boot.raw_quote", "context.boot.endorsed"
    )
    daemon.configure()
    daemon.reload()
    with daemon.client() as agent:
        assert agent.measure_event(b"x").pcr == 13
        with pytest.raises(Denied):
            agent.get_raw_quote(bytes(32))


def test_reload_of_an_unchanged_file_is_not_measured(daemon: Daemon) -> None:
    daemon.reload()
    assert len(evidence(daemon).records) == 2


def test_bad_file_on_reload_keeps_serving_and_shows(daemon: Daemon) -> None:
    daemon.configure("nonsense = 1\n")
    daemon.reload()
    assert daemon.shows("nonsense")
    assert daemon.manager.status.startswith("Serving")
    evidence(daemon)
    status = daemon.admin().get_status()
    assert (status.state, status.problems[-1].reason) == (admin_pb2.STATE_DEGRADED, "CONFIG_NOT_APPLIED")
    daemon.configure()
    daemon.reload()
    assert "nonsense" not in daemon.manager.status
    assert "CONFIG_NOT_APPLIED" not in [problem.reason for problem in daemon.admin().get_status().problems]


def test_change_that_needs_a_restart_shows_until_the_restart(daemon: Daemon) -> None:
    daemon.tables["limits"] = "calls = 7"
    daemon.tables["tpm"] += "\nregister = 14"
    daemon.configure()
    for _ in range(2):
        daemon.reload()
        assert "restart to apply changes to tpm, limits" in daemon.manager.status
    assert daemon.admin().get_status().agent_register == 13
    daemon.tables["tpm"] = daemon.tables["tpm"].replace("\nregister = 14", "")
    daemon.configure()
    daemon.reload()
    daemon.stop()
    daemon.start()
    assert "restart" not in daemon.manager.status


def test_reload_while_the_tpm_is_away_ends_and_applies(daemon: Daemon) -> None:
    away = daemon.tpm.data_socket.rename(daemon.folder / "away")
    daemon.grants = MEASURE
    daemon.configure()
    daemon.reload()
    away.rename(daemon.tpm.data_socket)
    with daemon.client() as agent:
        assert agent.measure_event(b"x").pcr == 13
    assert any("the reload was not measured" in line for line in daemon.journal)


# -- stop


def test_stop_lets_running_calls_end(daemon: Daemon) -> None:
    assert daemon.tpm.pid is not None
    os.kill(daemon.tpm.pid, signal.SIGSTOP)
    answers: list[bytes | AgentError] = []

    def slow() -> None:
        try:
            with daemon.client() as agent:
                answers.append(agent.get_evidence(bytes(16), AUDIENCE))
        except AgentError as error:
            answers.append(error)

    caller = threading.Thread(target=slow)
    caller.start()
    assert daemon.shows("; 1 callers")
    assert daemon.process is not None
    daemon.process.terminate()
    assert daemon.shows("Stopping")
    os.kill(daemon.tpm.pid, signal.SIGCONT)
    assert daemon.process.wait(60) == 0
    caller.join(60)
    assert isinstance(answers[0], bytes), answers
    assert judge(answers[0], bytes(16)).accepted
    assert not Path(daemon.socket).exists()
    with daemon.client() as agent, pytest.raises(Unavailable) as caught:
        agent.read_pcrs()
    assert caught.value.slug == "NO_SOCKET"


def test_stop_does_not_wait_for_a_tpm_that_hangs(daemon: Daemon) -> None:
    assert daemon.tpm.pid is not None
    os.kill(daemon.tpm.pid, signal.SIGSTOP)
    try:
        assert daemon.stop() == 0
    finally:
        os.kill(daemon.tpm.pid, signal.SIGCONT)


def test_stop_during_a_start_that_waits_for_the_tpm(stopped: Daemon) -> None:
    stopped.tpm.kill()
    stopped.start(ready=False)
    assert stopped.shows("Starting: ")
    assert stopped.stop() == 0


# -- start again


def test_restart_loses_nothing(daemon: Daemon) -> None:
    daemon.grants = MEASURE
    daemon.configure()
    daemon.reload()
    with daemon.client() as agent:
        agent.measure_event(b"kept")
        identity, log = agent.get_identity(), agent.get_event_log("agent")
    assert daemon.stop() == 0
    daemon.start()
    with daemon.client() as agent:
        assert agent.get_identity() == identity
        added = agent.get_event_log("agent").removeprefix(log)
    assert added != log
    assert [b"agent-start" in record.content for record in evidence(daemon).records] == [
        False,
        True,
        False,
        False,
        True,
    ]


def test_client_outlives_a_restart_of_the_daemon(daemon: Daemon) -> None:
    with daemon.client() as agent:
        assert agent.read_pcrs((0,))
        daemon.stop()
        with pytest.raises(Unavailable):
            agent.read_pcrs((0,))
        daemon.start()
        for _ in range(100):
            try:
                assert agent.read_pcrs((0,))
                return
            except Unavailable:
                time.sleep(0.1)  # grpc's own pause between attempts to connect
        pytest.fail("the client did not come back")


def test_kill_in_mid_flight_loses_no_record_that_was_confirmed(stopped: Daemon) -> None:
    stopped.grants = MEASURE
    confirmed: list[tuple[int, bytes]] = []

    def measure() -> None:
        try:
            with Agent(stopped.socket, timeout=10) as agent:
                for _ in range(16):
                    record = agent.measure_event(b"event")
                    confirmed.append((record.sequence, record.digest))
        except AgentError:
            return

    for round_number in range(3):
        stopped.start()
        caller = threading.Thread(target=measure)
        caller.start()
        enough = len(confirmed) + 2 + round_number
        while len(confirmed) < enough:
            time.sleep(0.001)
        stopped.kill()
        caller.join(60)
    stopped.start()
    records = evidence(stopped).records
    for sequence, digest in confirmed:
        assert records[sequence].digest == digest
    assert len(confirmed) <= sum(record.author == "caller" for record in records) <= len(confirmed) + 3
    with stopped.client() as agent:
        assert cel.parse_agent_log(agent.get_event_log("agent")) == records
