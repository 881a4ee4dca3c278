"""Attack 7: somebody else with the TPM claims to be the agent. Only the first in the register is, and has the key."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.domain.agentlog import AgentLog
from cgpu_agent.domain.boot import MeasuredBoot
from cgpu_agent.domain.evidence import Evidence
from cgpu_agent.domain.keys import Keys, establish, first_record
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import DeviceFault, Unavailable
from cgpu_agent.wire import cel
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.extradata import manifest_extra_data
from cgpu_agent.wire.manifest import LogDigest, parse_manifest
from fixtures.machine import AGENT, BOOT_ID, PLATFORM_AK, REGISTER, WORKLOAD, Machine, judge, request

pytestmark = pytest.mark.swtpm


class RogueLog(AgentLog):
    """The log of an agent whose code was changed not to mind what the register held before it came."""

    def open(self, tpm: TpmCommands) -> None:
        self._value = self._read(tpm)


@asynccontextmanager
async def rogue_agent(machine: Machine) -> AsyncIterator[tuple[RogueLog, Evidence]]:
    """A second agent with a state and an AK of its own, certified by the same platform AK in the same boot."""
    async with machine.agent() as core:
        log = RogueLog(store_beside(machine), REGISTER)
        keys = await core.tpm.run(lambda tpm: establish_with(tpm, store_beside(machine), log), timeout=60)
        boot = MeasuredBoot(core.tpm, keys, log, core.logs, timeout=60, seconds=Rate(core.clock, 60, "TPM_LIMIT", ""))
        yield log, Evidence(boot, core.clock, boot_id=BOOT_ID, agent=AGENT, pcrs=tuple(range(16)))


def store_beside(machine: Machine) -> Store:
    return Store(machine.runtime.parent / "rogue")


def establish_with(tpm: TpmCommands, store: Store, log: AgentLog) -> Keys:
    return establish(tpm, store, log, boot_id=BOOT_ID, platform_ak_handle=PLATFORM_AK, create="ecc")


async def verifiers_refusal(evidence: Evidence) -> str | None:
    asked = request()
    refusal = judge(await evidence.get(WORKLOAD, asked), asked.nonce).refusal
    assert refusal is not None
    return refusal.slug


def start_refusal(machine: Machine) -> str:
    async def scenario() -> None:
        async with machine.agent() as core:
            await core.establish()

    with pytest.raises(Unavailable) as caught:
        asyncio.run(scenario())
    return caught.value.slug


def test_second_agent_in_the_same_boot_is_not_first(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving():
            pass
        async with rogue_agent(machine) as (_, evidence):
            assert await verifiers_refusal(evidence) == "AGENT_LOG_MISMATCH"

    asyncio.run(scenario())
    assert start_refusal(machine) == "AGENT_LOG_DIVERGED"  # and the honest one sees that somebody was there


def test_second_agent_that_tells_the_whole_log_is_named_by_its_first_record(machine: Machine) -> None:
    """The rogue takes the honest log over and appends to it, so that it explains the register."""

    async def scenario() -> None:
        async with machine.serving() as core:
            honest = core.boot.log
        async with rogue_agent(machine) as (log, evidence):
            own = [
                cel.Record(len(honest.records) + record.sequence, REGISTER, "agent", record.content)
                for record in log.records
            ]
            log.data = honest.data + b"".join(record.encode() for record in own)
            assert await verifiers_refusal(evidence) == "AGENT_AK_NOT_FIRST"

    asyncio.run(scenario())


def test_who_extended_the_register_before_the_agent_ends_its_start(machine: Machine) -> None:
    machine.tpm.replay_boot([(REGISTER, bytes(32))])
    assert start_refusal(machine) == "REGISTER_IN_USE"


def test_agent_that_does_not_mind_is_refused_by_verifiers(machine: Machine) -> None:
    machine.tpm.replay_boot([(REGISTER, bytes(32))])

    async def scenario() -> None:
        async with rogue_agent(machine) as (_, evidence):
            assert await verifiers_refusal(evidence) == "AGENT_LOG_MISMATCH"

    asyncio.run(scenario())


def test_callers_event_cannot_pass_for_a_first_record(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            content = first_record(core.boot.keys.platform_ak_name)
            sequence, _ = await core.boot.measure_event(WORKLOAD, content)
            record = core.boot.log.records[sequence]
            assert record.content != content
            assert record.digest != cel.Record(sequence, REGISTER, "agent", content).digest

    asyncio.run(scenario())


def test_state_of_a_stranger_is_not_taken_over(machine: Machine) -> None:
    """Who can write the state directory is the agent or root; a stale or planted AK is still noticed."""

    machine.on_tpm(lambda tpm: establish_with(tpm, store := Store(machine.runtime), AgentLog(store, REGISTER)))
    beside = store_beside(machine)
    machine.on_tpm(lambda tpm: establish_with(tpm, beside, RogueLog(beside, REGISTER)))
    planted = beside.read("agent-ak")
    assert planted is not None
    # A fresh register with the honest records alone, so that nothing but the name speaks against the stranger.
    machine.tpm.restart()
    forged = json.loads(planted)
    forged["reset_count"] += 1
    (machine.runtime / "agent-ak").write_text(json.dumps(forged))
    records = cel.parse_agent_log((machine.runtime / "agent-log").read_bytes())
    machine.tpm.replay_boot([(REGISTER, record.digest) for record in records])
    assert start_refusal(machine) == "AGENT_AK"


def test_stolen_key_context_signs_nothing_without_the_agents_secret(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            bundle = parse_bundle(await core.evidence.get(WORKLOAD, request()))
            forged = dataclasses.replace(
                parse_manifest(bundle.manifest), agent_log=LogDigest.of(b"a log that tells another story")
            ).encode()
            key = core.boot.keys.agent_ak
            for guess in (b"\0" * 16, key.auth[:-1] + b"\0", base64.b64encode(key.auth)[:32]):
                stolen = dataclasses.replace(key, auth=guess)
                with pytest.raises(DeviceFault) as caught:
                    await core.tpm.run(
                        lambda tpm, stolen=stolen: tpm.quote(
                            stolen, manifest_extra_data(forged), core.evidence._selection
                        ),
                        timeout=30,
                    )
                assert caught.value.slug == "TPM_AUTH"

    asyncio.run(scenario())
