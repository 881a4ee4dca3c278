"""One quote for everybody who waits: nobody spoils it for the others, and each bundle verifies."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.evidence import MAX_BATCH, Evidence, Request
from cgpu_agent.errors import AgentError, DeviceFault, Misuse, Unavailable
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.manifest import Manifest, parse_manifest
from cgpu_agent.wire.statement import Statement, parse_statement
from fixtures.machine import AGENT, AUDIENCE, BOOT_ID, REGISTER, WORKLOAD, Machine, StoppedClock, judge, request

pytestmark = pytest.mark.swtpm

T = TypeVar("T")


@asynccontextmanager
async def busy_tpm(core: Core) -> AsyncIterator[None]:
    """Keep the TPM's thread in a job of somebody else's until the context ends."""
    began, release = threading.Event(), threading.Event()

    def wait(_tpm: TpmCommands) -> None:
        began.set()
        assert release.wait(60)

    blocker = asyncio.create_task(core.tpm.run(wait, timeout=60))
    await asyncio.to_thread(began.wait)
    try:
        yield
    finally:
        release.set()
        await blocker


async def settle() -> None:
    """Let every task that can go on go on."""
    for _ in range(20):
        await asyncio.sleep(0)


def manifest_of(bundle: bytes) -> Manifest:
    return parse_manifest(parse_bundle(bundle).manifest)


def statement_of(bundle: bytes) -> Statement:
    return parse_statement(parse_bundle(bundle).statement)


def test_bundle_verifies(machine: Machine) -> None:
    async def scenario() -> tuple[bytes, Request]:
        async with machine.serving() as core:
            asked = dataclasses.replace(request(), user_data=b"mine")
            return await core.evidence.get(WORKLOAD, asked), asked

    bundle, asked = asyncio.run(scenario())
    result = judge(bundle, asked.nonce, user_data=b"mine")
    assert result.accepted, result.refusal
    assert result.statement is not None
    assert result.manifest is not None
    assert result.statement.caller == WORKLOAD.claims()
    assert result.statement.boot_id == BOOT_ID
    assert result.statement.time == int(StoppedClock.now)
    assert dict(result.manifest.agent) == AGENT
    assert result.manifest.register == REGISTER
    assert [step.outcome.value for step in result.steps].count("refuse") == 0


def test_manifest_says_what_is_missing(machine: Machine) -> None:
    async def scenario() -> bytes:
        async with machine.serving() as core:
            return await core.evidence.get(WORKLOAD, request())

    manifest = manifest_of(asyncio.run(scenario()))
    missing = {part for part, _ in manifest.missing}
    assert {"systemd-log", "platform-ak-certificate"} <= missing
    assert "boot-log" not in missing


def test_one_caller_is_a_tree_of_one(machine: Machine) -> None:
    async def scenario() -> bytes:
        async with machine.serving() as core:
            return await core.evidence.get(WORKLOAD, request())

    bundle = parse_bundle(asyncio.run(scenario()))
    assert (bundle.leaf_index, bundle.inclusion_path) == (0, ())
    assert parse_manifest(bundle.manifest).tree_size == 1


def test_callers_that_arrive_during_a_quote_share_the_next(machine: Machine) -> None:
    async def scenario() -> tuple[bytes, list[bytes], list[Request]]:
        async with machine.serving() as core:
            async with busy_tpm(core):
                first = asyncio.create_task(core.evidence.get(WORKLOAD, request()))
                await settle()
                asked = [request() for _ in range(5)]
                later = [asyncio.create_task(core.evidence.get(WORKLOAD, each)) for each in asked]
                await settle()
            return await first, list(await asyncio.gather(*later)), asked

    first, later, asked = asyncio.run(scenario())
    assert manifest_of(first).tree_size == 1
    assert {parse_bundle(bundle).manifest for bundle in later} == {parse_bundle(later[0]).manifest}
    assert {parse_bundle(bundle).quote for bundle in later} == {parse_bundle(later[0]).quote}
    assert manifest_of(later[0]).tree_size == 5
    assert [parse_bundle(bundle).leaf_index for bundle in later] == list(range(5))
    for bundle, each in zip(later, asked, strict=True):
        assert judge(bundle, each.nonce).accepted


def test_nobody_gets_a_neighbours_statement(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            callers = [dataclasses.replace(WORKLOAD, uid=uid, pid=uid) for uid in range(1, 8)]
            asked = [request() for _ in callers]
            bundles = await asyncio.gather(
                *(core.evidence.get(caller, each) for caller, each in zip(callers, asked, strict=True))
            )
            for caller, each, bundle in zip(callers, asked, bundles, strict=True):
                statement = statement_of(bundle)
                assert (statement.nonce, statement.caller) == (each.nonce, caller.claims())
                assert sum(other.nonce.hex().encode() in parse_bundle(bundle).statement for other in asked) == 1

    asyncio.run(scenario())


def test_salts_of_equal_statements_differ(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            asked = request()
            one, two = await asyncio.gather(*(core.evidence.get(WORKLOAD, asked) for _ in range(2)))
            assert statement_of(one).salt != statement_of(two).salt

    asyncio.run(scenario())


def test_caller_that_leaves_costs_nothing_and_disturbs_nobody(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            async with busy_tpm(core):
                first = asyncio.create_task(core.evidence.get(WORKLOAD, request()))
                await settle()
                stays, leaves = request(), request()
                tasks = [asyncio.create_task(core.evidence.get(WORKLOAD, each)) for each in (leaves, stays)]
                await settle()
                tasks[0].cancel()
                await settle()
            await first
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            bundle = await tasks[1]
            assert manifest_of(bundle).tree_size == 1
            assert judge(bundle, stays.nonce).accepted

    asyncio.run(scenario())


def test_caller_that_leaves_during_its_quote_disturbs_nobody(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            stays, leaves = request(), request()
            async with busy_tpm(core):
                tasks = [asyncio.create_task(core.evidence.get(WORKLOAD, each)) for each in (leaves, stays)]
                await settle()
                tasks[0].cancel()
            bundle = await tasks[1]
            assert manifest_of(bundle).tree_size == 2
            assert judge(bundle, stays.nonce).accepted
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]

    asyncio.run(scenario())


def test_everybody_leaving_makes_no_quote(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            async with busy_tpm(core):
                first = asyncio.create_task(core.evidence.get(WORKLOAD, request()))
                await settle()
                others = [asyncio.create_task(core.evidence.get(WORKLOAD, request())) for _ in range(3)]
                await settle()
                for task in others:
                    task.cancel()
            await first
            await asyncio.gather(*others, return_exceptions=True)
            assert judge(await core.evidence.get(WORKLOAD, asked := request()), asked.nonce).accepted

    asyncio.run(scenario())


def test_more_callers_than_a_batch_holds_are_served_by_two(machine: Machine) -> None:
    async def scenario() -> list[bytes]:
        async with machine.serving() as core:
            return list(await asyncio.gather(*(core.evidence.get(WORKLOAD, request()) for _ in range(MAX_BATCH + 1))))

    bundles = asyncio.run(scenario())
    sizes = [manifest_of(bundle).tree_size for bundle in bundles]
    assert sorted(set(sizes)) == [1, MAX_BATCH]
    assert sizes.count(MAX_BATCH) == MAX_BATCH


def test_failing_batch_tells_each_of_its_callers_why_and_the_next_starts_clean(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving(request_seconds=1.0) as core:
            assert machine.tpm.pid is not None
            os.kill(machine.tpm.pid, signal.SIGSTOP)
            outcomes = await asyncio.gather(
                *(core.evidence.get(WORKLOAD, request()) for _ in range(3)), return_exceptions=True
            )
            assert [getattr(outcome, "slug", outcome) for outcome in outcomes] == ["TPM_TIMEOUT"] * 3
            assert all(isinstance(outcome, DeviceFault) for outcome in outcomes)
            assert not core.ready()
            os.kill(machine.tpm.pid, signal.SIGCONT)
            assert judge(await core.evidence.get(WORKLOAD, asked := request()), asked.nonce).accepted
            assert core.ready()

    asyncio.run(scenario())


def test_bug_in_a_batch_does_not_end_the_batches_after_it(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            core.evidence.agent = {"build": object()}  # type: ignore[dict-item]
            with pytest.raises(Unavailable) as caught:
                await core.evidence.get(WORKLOAD, request())
            assert caught.value.slug == "EVIDENCE_FAILED"
            assert "object" not in caught.value.message
            core.evidence.agent = dict(AGENT)
            assert judge(await core.evidence.get(WORKLOAD, asked := request()), asked.nonce).accepted

    asyncio.run(scenario())


def test_foreign_extend_of_the_register_refuses_evidence_for_good(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            machine.tpm.replay_boot([(REGISTER, bytes(32))])
            for _ in range(2):
                with pytest.raises(Unavailable) as caught:
                    await core.evidence.get(WORKLOAD, request())
                assert caught.value.slug == "AGENT_LOG_DIVERGED"
            assert core.state() == "refusing"

    asyncio.run(scenario())


def test_refusals_do_not_pile_up_tracebacks(machine: Machine) -> None:
    def depth(error: BaseException) -> int:
        trace, count = error.__traceback__, 0
        while trace is not None:
            trace, count = trace.tb_next, count + 1
        return count

    async def refusal(ask: Callable[[], object]) -> int:
        try:
            await ask()  # type: ignore[misc]
        except AgentError as error:
            return depth(error)
        raise AssertionError("not refused")

    async def scenario() -> None:
        async with machine.serving() as core:
            machine.tpm.replay_boot([(REGISTER, bytes(32))])
            depths = [await refusal(lambda: core.boot.measure_event(WORKLOAD, b"x")) for _ in range(10)]
            assert len(set(depths[1:])) == 1

    asyncio.run(scenario())


def test_event_whose_outcome_was_lost_does_not_end_evidence(machine: Machine) -> None:
    """Attack 21, without a restart: the extend was made, its caller heard nothing."""

    async def scenario() -> None:
        async with machine.serving(request_seconds=1.0) as core:
            began, release = threading.Event(), threading.Event()
            append = core.store.append

            def slow(name: str, data: bytes, *, at: int) -> None:
                began.set()
                assert release.wait(60)
                raise Unavailable("STATE_DIRECTORY", "lost between extend and append", retry_after=1.0)

            core.store.append = slow  # type: ignore[method-assign]
            with pytest.raises(DeviceFault) as caught:
                await core.boot.measure_event(WORKLOAD, b"event")
            assert (caught.value.slug, caught.value.outcome_unknown) == ("TPM_TIMEOUT", True)
            assert began.is_set()
            core.store.append = append  # type: ignore[method-assign]
            release.set()
            result = judge(await core.evidence.get(WORKLOAD, asked := request()), asked.nonce)
            assert result.accepted, result.refusal
            assert [record.author for record in result.records] == ["agent", "agent", "caller"]

    asyncio.run(scenario())


def test_changed_configuration_is_in_the_log_and_in_evidence_from_then_on(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            changed = {**AGENT, "config": "44" * 32}
            await core.reloaded(changed)
            result = judge(await core.evidence.get(WORKLOAD, asked := request()), asked.nonce)
            assert result.accepted
            assert result.manifest is not None
            assert result.manifest.agent["config"] == "44" * 32
            assert b"agent-reload" in result.records[-1].content

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({"nonce": bytes(7)}, "BAD_NONCE"),
        ({"nonce": bytes(65)}, "BAD_NONCE"),
        ({"audience": ""}, "BAD_AUDIENCE"),
        ({"audience": "a" * 256}, "BAD_AUDIENCE"),
        ({"audience": "a\nb"}, "BAD_AUDIENCE"),
        ({"audience": "a\u2028b"}, "BAD_AUDIENCE"),
        ({"audience": "\ud800"}, "BAD_AUDIENCE"),
        ({"user_data": bytes(65)}, "BAD_BINDING"),
        ({"public_key": b""}, "BAD_BINDING"),
        ({"public_key": bytes(2049)}, "BAD_BINDING"),
    ],
)
def test_request_outside_its_limits_is_refused(changes: dict[str, object], slug: str) -> None:
    with pytest.raises(Misuse) as caught:
        dataclasses.replace(request(), **changes).check()
    assert caught.value.slug == slug


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": bytes(8)},
        {"nonce": bytes(64)},
        {"audience": "ä" * 127},
        {"user_data": b""},
        {"user_data": bytes(64)},
        {"public_key": bytes(2048)},
    ],
)
def test_request_at_its_limits_is_good(changes: dict[str, object]) -> None:
    asked = dataclasses.replace(request(), **changes)
    asked.check()
    assert asked.audience in (AUDIENCE, "ä" * 127)


def test_quote_that_leaves_the_register_out_cannot_be_configured(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            with pytest.raises(ValueError, match="register"):
                Evidence(core.boot, StoppedClock(), boot_id=BOOT_ID, agent=AGENT, pcrs=(0, 1, 2))

    asyncio.run(scenario())
