"""The real daemon and its callers: every call, by whoever may make it, and a clear refusal for everybody else."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cgpu_agent.client import Agent
from cgpu_agent.client.calls import Identity, Measured, Quote
from cgpu_agent.errors import Denied, Exhausted, Misuse, Unavailable
from cgpu_agent.verifier.credential import make_credential
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.quote import verify_quote
from cgpu_agent.wire import cel
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.extradata import caller_quote_extra_data
from cgpu_agent.wire.manifest import parse_manifest
from cgpu_agent.wire.statement import parse_statement
from cgpu_agent.wire.tpm import parse_attest, parse_public
from fixtures.daemon import Daemon, booted_daemon
from fixtures.machine import AUDIENCE, BOOT_LOG, judge
from fixtures.policies import permit
from fixtures.workload import ask

pytestmark = pytest.mark.swtpm

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
NONCE = bytes(range(32))


@pytest.fixture(scope="module")
def served() -> Iterator[Daemon]:
    """One daemon for tests that only ask; its operator granted nothing."""
    with booted_daemon() as agent:
        agent.start()
        yield agent


@pytest.fixture(scope="module")
def granted() -> Iterator[Daemon]:
    """One whose operator granted this user everything."""
    with booted_daemon() as agent:
        agent.grants = "".join(
            permit(action, f"principal.uid == {os.geteuid()}")
            for action in ("boot.raw_quote", "boot.measure", "boot.activate_credential")
        )
        agent.start()
        yield agent


CALLS: dict[str, tuple[Any, type]] = {
    "get_evidence": ((NONCE, AUDIENCE), bytes),
    "get_identity": ((), Identity),
    "get_quote": ((NONCE,), Quote),
    "get_raw_quote": ((NONCE,), Quote),
    "read_pcrs": ((), dict),
    "get_event_log": (("agent",), bytes),
    "measure_event": ((b"event",), Measured),
}


@pytest.mark.parametrize("method", CALLS)
def test_sync_and_async_client_get_the_same_kind_of_answer(granted: Daemon, method: str) -> None:
    arguments, kind = CALLS[method]

    async def ask_async() -> object:
        async with granted.async_client() as agent:
            return await getattr(agent, method)(*arguments)

    with granted.client() as agent:
        answers = [getattr(agent, method)(*arguments), asyncio.run(ask_async())]
    assert [type(answer) for answer in answers] == [kind, kind]


def test_bundle_verifies_and_names_this_process(served: Daemon) -> None:
    nonce = secrets.token_bytes(32)
    with served.client() as agent:
        result = judge(agent.get_evidence(nonce, AUDIENCE, user_data=b"mine"), nonce, user_data=b"mine")
    assert result.accepted, result.refusal
    assert result.statement is not None
    caller = result.statement.caller
    assert (caller["uid"], caller["gid"], caller["pid"]) == (os.geteuid(), os.getegid(), os.getpid())
    assert result.manifest is not None
    assert result.manifest.agent["config"] == hashlib.sha256(served.config.read_bytes()).hexdigest()
    assert result.secure_boot is not None


def test_bound_key_is_in_the_statement(served: Daemon) -> None:
    nonce, key = secrets.token_bytes(32), b"\x30\x00"
    with served.client() as agent:
        bundle = agent.get_evidence(nonce, AUDIENCE, public_key=key)
    assert judge(bundle, nonce, public_key=key).accepted
    assert judge(bundle, nonce, public_key=b"\x30\x01\x00").refusal is not None


def test_workloads_that_ask_together_share_quotes(served: Daemon) -> None:
    async def scenario() -> list[bytes]:
        async with served.async_client() as agent:
            return list(await asyncio.gather(*(agent.get_evidence(NONCE, AUDIENCE) for _ in range(50))))

    bundles = [parse_bundle(bundle) for bundle in asyncio.run(scenario())]
    assert len({bundle.quote for bundle in bundles}) < len(bundles)
    assert {parse_statement(bundle.statement).nonce for bundle in bundles} == {NONCE}
    assert len({(bundle.manifest, bundle.leaf_index) for bundle in bundles}) == len(bundles)


def test_identity_is_that_of_the_evidence(served: Daemon) -> None:
    with served.client() as agent:
        identity, bundle = agent.get_identity(), parse_bundle(agent.get_evidence(NONCE, AUDIENCE))
    assert (identity.platform_ak, identity.agent_ak) == (bundle.platform_ak, bundle.agent_ak)
    assert identity.agent_ak_certify_attest == bundle.agent_ak_certify.attest
    assert (identity.manufacturer, identity.reset_count) == ("IBM", parse_manifest(bundle.manifest).reset_count)
    assert [parse_public(ek).name_alg for ek in (identity.ek_rsa, identity.ek_ecc)] == ["sha256", "sha256"]


def test_quote_verifies_with_one_line_and_no_bundle(served: Daemon) -> None:
    with served.client() as agent:
        identity, quote = agent.get_identity(), agent.get_quote(NONCE, (0, 4, 7))
    result = verify_quote(
        quote.attest,
        quote.signature,
        load_attestation_key(identity.platform_ak),
        nonce=caller_quote_extra_data(quote.caller_claims, NONCE),
        pcrs=quote.pcrs,
        expected_pcrs=frozenset({0, 4, 7}),
    )
    assert result.refusal is None
    assert json.loads(quote.caller_claims)["pid"] == os.getpid()


def test_pcrs_and_logs_are_those_of_the_machine(served: Daemon) -> None:
    with served.client() as agent:
        pcrs = agent.read_pcrs()
        assert pcrs.keys() == set(range(24))
        assert agent.read_pcrs((3, 5)) == {3: pcrs[3], 5: pcrs[5]}
        assert agent.get_event_log("boot") == BOOT_LOG.read_bytes()
        assert [record.author for record in cel.parse_agent_log(agent.get_event_log("agent"))] == ["agent", "agent"]
        with pytest.raises(Unavailable) as caught:
            agent.get_event_log("systemd")
        assert caught.value.slug == "LOG_ABSENT"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("get_raw_quote", (NONCE,)),
        ("measure_event", (b"event",)),
        ("activate_credential", ("rsa", b"x", b"y")),
    ],
)
def test_what_speaks_for_the_vm_is_denied_by_default(served: Daemon, method: str, arguments: tuple[Any, ...]) -> None:
    async def ask_async() -> None:
        async with served.async_client() as agent:
            await getattr(agent, method)(*arguments)

    with served.client() as agent:
        for attempt in (lambda: getattr(agent, method)(*arguments), lambda: asyncio.run(ask_async())):
            with pytest.raises(Denied) as caught:
                attempt()
            assert caught.value.slug == "NOT_ALLOWED"


def test_granted_raw_quote_signs_the_bytes_as_they_are(granted: Daemon) -> None:
    with granted.client() as agent:
        assert parse_attest(agent.get_raw_quote(b"any bytes").attest).extra_data == b"any bytes"


def test_granted_event_is_in_register_log_and_evidence(granted: Daemon) -> None:
    nonce = secrets.token_bytes(32)
    with granted.client() as agent:
        before = agent.read_pcrs((13,))[13]
        measured = agent.measure_event(b"model 7 loaded")
        assert agent.read_pcrs((13,))[13] == hashlib.sha256(before + measured.digest).digest()
        result = judge(agent.get_evidence(nonce, AUDIENCE), nonce)
    record = result.records[measured.sequence]
    assert (record.digest, record.author, measured.pcr) == (measured.digest, "caller", 13)


@pytest.mark.parametrize("algorithm", ["rsa", "ecc"])
def test_granted_credential_opens(granted: Daemon, algorithm: str) -> None:
    with granted.client() as agent:
        identity = agent.get_identity()
        ek = parse_public(identity.ek_rsa if algorithm == "rsa" else identity.ek_ecc)
        blob, secret = make_credential(ek, parse_public(identity.platform_ak).name, b"for this VM alone")
        assert agent.activate_credential(algorithm, blob, secret) == b"for this VM alone"  # type: ignore[arg-type]
        with pytest.raises(Unavailable) as caught:
            agent.activate_credential(algorithm, blob[:-1] + b"\0", secret)  # type: ignore[arg-type]
        assert caught.value.slug.startswith("TPM_")


@pytest.mark.parametrize(
    ("attempt", "slug"),
    [
        (lambda agent: agent.get_evidence(bytes(7), AUDIENCE), "BAD_NONCE"),
        (lambda agent: agent.get_evidence(NONCE, ""), "BAD_AUDIENCE"),
        (lambda agent: agent.get_evidence(NONCE, AUDIENCE, user_data=bytes(65)), "BAD_BINDING"),
        (lambda agent: agent.get_quote(NONCE, (24,)), "BAD_PCR"),
        (lambda agent: agent.get_quote(NONCE, range(24, 60)), "BAD_PCR"),
        (lambda agent: agent.get_quote(b""), "BAD_NONCE"),
    ],
)
def test_bad_request_is_named(served: Daemon, attempt: Any, slug: str) -> None:
    with served.client() as agent, pytest.raises(Misuse) as caught:
        attempt(agent)
    assert caught.value.slug == slug


def test_request_over_64_kib_is_refused_and_the_connection_lives(served: Daemon) -> None:
    with served.client() as agent:
        with pytest.raises(Exhausted):
            agent.get_evidence(NONCE, AUDIENCE, public_key=bytes(1 << 16))
        assert agent.read_pcrs((0,))


def test_limit_error_carries_its_reason_and_a_time_to_retry() -> None:
    with booted_daemon() as daemon:
        daemon.tables["limits"] = "calls_per_uid = 1"
        daemon.start()

        async def scenario() -> list[Any]:
            async with daemon.async_client() as agent:
                return await asyncio.gather(
                    *(agent.get_evidence(NONCE, AUDIENCE) for _ in range(20)), return_exceptions=True
                )

        outcomes = asyncio.run(scenario())
        refused = [outcome for outcome in outcomes if isinstance(outcome, Exhausted)]
        assert {(error.slug, error.retry_after) for error in refused} == {("TOO_MANY_CALLS", 0.1)}
        assert any(isinstance(outcome, bytes) for outcome in outcomes)


@needs_root
def test_other_users_are_served_and_known_apart(served: Daemon) -> None:
    claims = [ask(served.socket, "claims", uid=uid) for uid in (None, 1234, 4321)]
    assert [each["uid"] for each in claims] == [0, 1234, 4321]
    assert len({each["pid"] for each in claims}) == 3
    assert {each["identity_strength"] for each in claims} <= {"pidfd", "pid"}


@needs_root
def test_user_that_the_kernel_cannot_name_is_refused(served: Daemon) -> None:
    assert ask(served.socket, "claims", uid=65534)[0] == "CALLER_UNIDENTIFIED"


@needs_root
def test_grant_to_one_uid_is_none_to_another(granted: Daemon) -> None:
    assert ask(granted.socket, "measure", uid=1234)[0] == "NOT_ALLOWED"
    assert isinstance(ask(granted.socket, "measure"), int)


def test_who_goes_round_the_front_door_is_nobody(served: Daemon) -> None:
    with Agent(f"{served.folder}/private/a/s") as agent, pytest.raises(Denied) as caught:
        agent.read_pcrs()
    assert caught.value.slug == "CALLER_UNKNOWN"


@needs_root
def test_admin_socket_is_for_operators(served: Daemon) -> None:
    assert ask(served.admin_socket, "status").startswith("Serving")
    assert ask(served.admin_socket, "status", uid=1234)[0] == "SOCKET_DENIED"
    path = Path(served.admin_socket)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)  # the file mode is not the only lock
    try:
        assert ask(served.admin_socket, "status", uid=1234)[0] == "NOT_ALLOWED"
    finally:
        path.chmod(0o600)


def test_status_tells_what_happened(served: Daemon) -> None:
    with served.client() as agent, pytest.raises(Denied):
        agent.measure_event(b"x")
    status = served.admin().get_status()
    counts = {(entry.method.rsplit("/", 1)[1], entry.code): entry.count for entry in status.calls}
    assert counts["MeasureEvent", "PERMISSION_DENIED"] >= 1
    assert not any("SelfCheck" in method for method, _ in counts)
    assert [problem.reason for problem in status.problems][:1] == ["UNENDORSED"]
    assert status.status_line.startswith("Serving: TPM IBM, AK unendorsed, boot log present")
    assert status.tpm.platform_ak_endorsement == "none"
    assert list(status.tpm.evidence_pcrs) == list(range(16))
    assert (status.agent_register, status.agent_log_records) == (13, 2)
    assert status.door.accepted > 0
    assert status.uptime_seconds > 0


def test_health_and_reflection_answer(served: Daemon) -> None:
    with grpc.insecure_channel(f"unix:{served.socket}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == serving
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == serving
        watch.cancel()
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([asked]), timeout=30)
        names = {service.name for service in answer.list_services_response.service}
        assert {"cgpu.agent.v1.MeasuredBoot", "cgpu.agent.v1.Evidence", "grpc.health.v1.Health"} <= names
        assert not any("internal" in name or "Admin" in name for name in names)


def test_self_check_answers_nobody_but_the_daemon_itself(served: Daemon) -> None:
    with grpc.insecure_channel(f"unix:{served.socket}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/cgpu.agent.internal.SelfCheck/Pid")(b"", timeout=30)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_tpm_is_never_put_into_systemds_keeping(served: Daemon) -> None:
    """Attack 29: a stored descriptor would bring a late answer and other people's sessions into the next run."""
    assert not any("FDSTORE" in line or "FDNAME" in line for line in served.manager.lines)


def test_journal_is_lines_with_a_priority_and_says_who_was_refused(served: Daemon) -> None:
    with served.client() as agent, pytest.raises(Denied):
        agent.get_raw_quote(NONCE)
    assert all(line[0] == "<" and line[1].isdigit() and line[2] == ">" for line in served.journal)
    refusal = next(line for line in served.journal if "GetRawQuote" in line)
    assert f"reason=NOT_ALLOWED uid={os.geteuid()} pid={os.getpid()}" in refusal
