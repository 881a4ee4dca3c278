"""Attack 7: somebody else with the TPM claims to be the agent. Only the first in the register is, and has the key."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json

import pytest
from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.domain.agentlog import AgentLog
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.keys import establish, first_record
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import DeviceFault, Unavailable
from cgpu_agent.wire import cel
from cgpu_agent.wire.bundle import LogDigest, manifest_extra_data, parse_bundle, parse_manifest
from fixtures.machine import BOOT_ID, PLATFORM_AK, REGISTER, WORKLOAD, Machine, judge, request

pytestmark = pytest.mark.swtpm


async def refused_by_a_verifier(core: Core, expected: str) -> None:
    asked = request()
    refusal = judge(await core.evidence.get(WORKLOAD, asked), asked.nonce).refusal
    assert refusal is not None
    assert refusal.slug == expected, refusal


def test_second_agent_in_the_same_boot_is_not_first(machine: Machine) -> None:
    """It has its own state, its own AK, certified by the same platform AK: all but the register's beginning."""

    async def scenario() -> None:
        async with machine.serving():
            pass
        rogue = Machine(machine.tpm, machine.runtime.parent / "rogue")
        rogue.runtime.parent.mkdir(mode=0o700)
        async with rogue.serving() as core:
            await refused_by_a_verifier(core, "AGENT_LOG_MISMATCH")
        async with machine.agent() as core:  # and the honest one sees that somebody was there
            with pytest.raises(Unavailable) as caught:
                await core.establish()
            assert caught.value.slug == "AGENT_LOG_DIVERGED"

    asyncio.run(scenario())


def test_second_agent_that_tells_the_whole_log_is_named_by_its_first_record(machine: Machine) -> None:
    """The rogue takes the honest log over and appends to it, so that it explains the register."""

    async def scenario() -> None:
        async with machine.serving() as core:
            honest = core.boot.log.data
        rogue = Machine(machine.tpm, machine.runtime.parent / "rogue")
        rogue.runtime.parent.mkdir(mode=0o700)
        async with rogue.serving() as core:
            log = core.boot.log
            own = [record.content for record in log.records]
            records = [
                *cel.parse_agent_log(honest),
                *(cel.Record(2 + number, REGISTER, "agent", content) for number, content in enumerate(own)),
            ]
            log.data = b"".join(record.encode() for record in records)
            await refused_by_a_verifier(core, "AGENT_AK_NOT_FIRST")

    asyncio.run(scenario())


def test_extend_before_the_agents_first_start_is_refused_by_verifiers(machine: Machine) -> None:
    """Who was first without a log of it: the agent keeps the base, but nothing explains it."""
    machine.tpm.replay_boot([(REGISTER, bytes(32))])

    async def scenario() -> None:
        async with machine.serving() as core:
            await refused_by_a_verifier(core, "AGENT_LOG_MISMATCH")

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

    def start(tpm: TpmCommands, machine: Machine) -> None:
        store = Store(machine.runtime)
        establish(
            tpm,
            store,
            AgentLog(store, REGISTER),
            boot_id=BOOT_ID,
            platform_ak_handle=PLATFORM_AK,
            create="ecc",
        )

    machine.on_tpm(lambda tpm: start(tpm, machine))
    rogue = Machine(machine.tpm, machine.runtime.parent / "rogue")
    rogue.runtime.parent.mkdir(mode=0o700)
    rogue.on_tpm(lambda tpm: start(tpm, rogue))
    (machine.runtime / "agent-ak").write_bytes((rogue.runtime / "agent-ak").read_bytes())
    # A fresh register with the honest records alone, so that nothing but the name speaks against the stranger.
    machine.tpm.restart()
    forged = json.loads((machine.runtime / "agent-ak").read_bytes())
    forged["reset_count"] += 1
    (machine.runtime / "agent-ak").write_text(json.dumps(forged))
    records = cel.parse_agent_log((machine.runtime / "agent-log").read_bytes())
    machine.tpm.replay_boot([(REGISTER, record.digest) for record in records])
    with pytest.raises(Unavailable) as caught:
        machine.on_tpm(lambda tpm: start(tpm, machine))
    assert caught.value.slug == "AGENT_AK"


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
