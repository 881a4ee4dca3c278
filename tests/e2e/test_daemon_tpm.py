"""The real daemon when its TPM is late, hangs, dies or is reset: it waits, says so, and never serves a lie."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cgpu_agent.api.v1 import admin_pb2
from cgpu_agent.errors import AgentError, Unavailable
from fixtures.daemon import Daemon, booted_daemon
from fixtures.machine import AUDIENCE, judge, replay_boot

pytestmark = pytest.mark.swtpm

SHORT = 'create_platform_ak = "ecc"\ncommand_seconds = 1\nrequest_seconds = 1'


@pytest.fixture
def brief() -> Iterator[Daemon]:
    """A daemon, not started, that gives its TPM one second."""
    with booted_daemon() as agent:
        agent.tables["tpm"] = SHORT
        yield agent


def healthy(daemon: Daemon) -> bool:
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def serves(daemon: Daemon) -> bool:
    nonce = secrets.token_bytes(32)
    with daemon.client() as agent:
        return judge(agent.get_evidence(nonce, AUDIENCE), nonce).accepted


def refusal(daemon: Daemon) -> AgentError:
    with daemon.client() as agent, pytest.raises(AgentError) as caught:
        agent.get_evidence(bytes(16), AUDIENCE)
    return caught.value


def test_daemon_waits_for_a_tpm_that_comes_late(brief: Daemon) -> None:
    brief.tpm.kill()
    brief.start()
    assert brief.manager.status.startswith("Starting: the TPM")
    error = refusal(brief)
    assert isinstance(error, Unavailable)
    assert (error.slug, error.retry_after) == ("NOT_READY", 2.0)
    assert not healthy(brief)
    status = brief.admin().get_status()
    assert status.state == admin_pb2.STATE_STARTING
    assert [problem.reason for problem in status.problems] == ["TPM_IO"]
    assert not status.HasField("tpm")
    brief.tpm.start()
    replay_boot(brief.tpm)
    assert brief.shows("Serving")
    assert serves(brief)
    assert healthy(brief)


def test_hung_tpm_fails_calls_in_time_and_heals_by_itself(brief: Daemon) -> None:
    brief.start()
    assert brief.tpm.pid is not None
    os.kill(brief.tpm.pid, signal.SIGSTOP)
    errors: list[AgentError] = []
    callers = [threading.Thread(target=lambda: errors.append(refusal(brief))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert {error.slug for error in errors} == {"TPM_TIMEOUT"}
    assert brief.shows("Waiting for the TPM: the TPM did not answer in time")
    assert not healthy(brief)
    status = brief.admin().get_status()
    assert (status.state, status.problems[0].reason) == (admin_pb2.STATE_DEGRADED, "TPM_TIMEOUT")
    os.kill(brief.tpm.pid, signal.SIGCONT)
    assert brief.shows("Serving")  # its own probe finds out
    assert serves(brief)
    assert healthy(brief)


def test_start_with_a_hung_tpm_becomes_ready_and_serves_when_it_goes_on(brief: Daemon) -> None:
    assert brief.tpm.pid is not None
    os.kill(brief.tpm.pid, signal.SIGSTOP)
    brief.start()
    assert brief.manager.status.startswith("Starting")
    assert refusal(brief).slug == "NOT_READY"
    os.kill(brief.tpm.pid, signal.SIGCONT)
    assert brief.shows("Serving")
    assert serves(brief)


def test_tpm_that_dies_and_comes_back_was_reset_and_is_refused(daemon: Daemon) -> None:
    assert serves(daemon)
    daemon.tpm.kill()
    assert refusal(daemon).slug == "TPM_IO"
    assert daemon.shows("Waiting for the TPM: ")
    assert not healthy(daemon)
    daemon.tpm.start()
    replay_boot(daemon.tpm)
    error = refusal(daemon)
    assert (error.slug, error.retry_after) == ("TPM_RESET_DETECTED", None)
    assert daemon.shows("Refusing evidence: the TPM was reset")
    assert not healthy(daemon)
    assert daemon.admin().get_status().state == admin_pb2.STATE_REFUSING
    with daemon.client() as agent:
        for attempt in (lambda: agent.get_quote(bytes(16)), agent.read_pcrs):
            with pytest.raises(Unavailable) as caught:
                attempt()
            assert caught.value.slug == "TPM_RESET_DETECTED"
    # A restart of the agent is no reboot of the machine.
    assert daemon.stop() == 0
    daemon.start()
    assert refusal(daemon).slug == "TPM_RESET_DETECTED"
    assert daemon.manager.status.startswith("Refusing evidence: the TPM was reset")


def test_reset_that_nobody_called_into_is_noticed_by_the_daemon_itself(daemon: Daemon) -> None:
    assert serves(daemon)
    daemon.tpm.restart()
    assert daemon.shows("Refusing evidence: the TPM was reset")


def test_foreign_extend_of_the_register_is_refused_in_words(daemon: Daemon) -> None:
    daemon.tpm.replay_boot([(13, bytes(32))])
    assert refusal(daemon).slug == "AGENT_LOG_DIVERGED"
    assert daemon.shows("Refusing evidence: PCR 13 holds what the agent log does not explain")
    assert not healthy(daemon)


def test_watchdog_is_fed_while_the_tpm_hangs_within_its_limits(brief: Daemon) -> None:
    """A slow TPM is no reason to restart the agent; a thread that never comes back would be (see test_watchdog)."""
    brief.environment = {"WATCHDOG_USEC": "3000000"}
    brief.start()
    assert brief.tpm.pid is not None
    os.kill(brief.tpm.pid, signal.SIGSTOP)
    seen = brief.manager.lines.count("WATCHDOG=1")
    assert refusal(brief).slug == "TPM_TIMEOUT"
    assert brief.manager.wait(lambda: brief.manager.lines.count("WATCHDOG=1") > seen + 1)
    os.kill(brief.tpm.pid, signal.SIGCONT)
