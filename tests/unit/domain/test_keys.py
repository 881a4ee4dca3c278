"""One agent AK a boot: kept over restarts, dropped with the boot, and never trusted after a reset of the TPM."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable

import pytest

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.domain.agentlog import AgentLog
from cgpu_agent.domain.keys import AK_CERTIFICATE_INDEX, Keys, establish, first_record
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import DeviceFault, Unavailable
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.signature import verify_signature
from cgpu_agent.wire.extradata import agent_ak_qualifying_data
from cgpu_agent.wire.tpm import Certified, KeyBlob, PcrSelection, parse_attest
from fixtures.machine import AGENT, BOOT_ID, PLATFORM_AK, REGISTER, WORKLOAD, Machine, replay_boot, request
from fixtures.swtpm import running_swtpm

pytestmark = pytest.mark.swtpm

OTHER_BOOT = "00000000-0000-4000-8000-000000000000"


def start(machine: Machine, boot_id: str = BOOT_ID, create: str | None = "ecc") -> Keys:
    def job(tpm: TpmCommands) -> Keys:
        store = Store(machine.runtime)
        log = AgentLog(store, REGISTER)
        return establish(tpm, store, log, boot_id=boot_id, platform_ak_handle=PLATFORM_AK, create=create)  # type: ignore[arg-type]

    return machine.on_tpm(job)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(Unavailable) as caught:
        action()
    return caught.value.slug


def test_restart_in_the_same_boot_keeps_both_keys(machine: Machine) -> None:
    first, second = start(machine), start(machine)
    assert second.agent_ak_name == first.agent_ak_name
    assert second.platform_ak_name == first.platform_ak_name
    assert second.agent_ak_certify == first.agent_ak_certify


def test_key_of_a_restart_still_signs(machine: Machine) -> None:
    start(machine)
    keys = start(machine)
    quote = machine.on_tpm(lambda tpm: tpm.quote(keys.agent_ak, b"n", PcrSelection.of("sha256", [REGISTER])))
    verify_signature(load_attestation_key(keys.agent_ak.public), quote.attest, quote.signature)


def test_platform_ak_certifies_the_agents(machine: Machine) -> None:
    keys = start(machine)
    verify_signature(
        load_attestation_key(keys.platform_ak), keys.agent_ak_certify.attest, keys.agent_ak_certify.signature
    )
    attest = parse_attest(keys.agent_ak_certify.attest)
    assert isinstance(attest.attested, Certified)
    assert attest.attested.name == keys.agent_ak_name
    assert attest.extra_data == agent_ak_qualifying_data(keys.agent_ak_name)


def test_first_record_names_the_agent_ak(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            first, *rest = core.boot.log.records
            assert first.author == "agent"
            assert first.content == first_record(core.boot.keys.agent_ak_name)
            assert [json.loads(record.content) for record in rest] == [{"event": "agent-start", **AGENT}]

    asyncio.run(scenario())


def test_second_start_appends_its_own_start_only(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            before = core.boot.log.data
        async with machine.serving() as core:
            added = core.boot.log.data.removeprefix(before)
            assert len(added) < len(core.boot.log.data)
            assert [json.loads(record.content)["event"] for record in core.boot.log.records] == [
                "agent-ak",
                "agent-start",
                "agent-start",
            ]

    asyncio.run(scenario())


def test_another_boot_gets_another_key(machine: Machine) -> None:
    first = start(machine)
    machine.tpm.restart()
    second = start(machine, OTHER_BOOT)
    assert second.agent_ak_name != first.agent_ak_name
    assert second.clock.reset_count == first.clock.reset_count + 1
    assert second.platform_ak_name == first.platform_ak_name


def test_another_boot_begins_an_empty_log(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving():
            pass
        machine.tpm.restart()
        async with machine.serving(boot_id=OTHER_BOOT) as core:
            assert [record.sequence for record in core.boot.log.records] == [0, 1]
            assert core.boot.log.records[0].content == first_record(core.boot.keys.agent_ak_name)

    asyncio.run(scenario())


def test_crash_while_an_earlier_boot_is_discarded_is_recovered(machine: Machine) -> None:
    start(machine)
    machine.tpm.restart()
    (machine.runtime / "agent-log").unlink()  # discarded before the crash
    assert start(machine, OTHER_BOOT).clock.reset_count == 2


def test_reset_of_the_tpm_between_two_starts_of_one_boot_is_detected(machine: Machine) -> None:
    start(machine)
    machine.tpm.restart()
    assert refused(lambda: start(machine)) == "TPM_RESET_DETECTED"


def test_reset_under_a_live_agent_is_detected_by_everything_that_signs_or_measures(machine: Machine) -> None:
    async def scenario() -> None:
        for ask in ("evidence", "quote", "raw", "measure", "probe"):
            async with machine.serving() as core:
                boot = core.boot
                calls = {
                    "evidence": lambda core=core: core.evidence.get(WORKLOAD, request()),
                    "quote": lambda boot=boot: boot.quote(WORKLOAD, bytes(16), ()),
                    "raw": lambda boot=boot: boot.raw_quote(WORKLOAD, bytes(16), ()),
                    "measure": lambda boot=boot: boot.measure_event(WORKLOAD, b"event"),
                    "probe": boot.probe,
                }
                machine.tpm.restart()
                for call in (calls[ask], *calls.values()):  # the first one finds out, and it holds for all
                    with pytest.raises(Unavailable) as caught:
                        await call()
                    assert caught.value.slug == "TPM_RESET_DETECTED"
                assert core.state() == "refusing"
                assert not core.ready()
            for path in machine.runtime.iterdir():
                path.unlink()

    asyncio.run(scenario())


def test_replayed_log_after_a_reset_does_not_help(machine: Machine) -> None:
    """Attack 32: who resets the TPM and extends the good log again has the PCRs, but not the counters."""
    log = machine.on_tpm(lambda tpm: _log(machine, tpm))
    machine.tpm.restart()
    replay_boot(machine.tpm)
    machine.tpm.replay_boot([(REGISTER, record.digest) for record in log.records])
    assert refused(lambda: start(machine)) == "TPM_RESET_DETECTED"


def _log(machine: Machine, tpm: TpmCommands) -> AgentLog:
    store = Store(machine.runtime)
    log = AgentLog(store, REGISTER)
    establish(tpm, store, log, boot_id=BOOT_ID, platform_ak_handle=PLATFORM_AK, create="ecc")
    return log


def test_lost_key_with_records_of_it_refuses(machine: Machine) -> None:
    start(machine)
    (machine.runtime / "agent-ak").unlink()
    assert refused(lambda: start(machine)) == "AGENT_AK"
    assert not (machine.runtime / "agent-ak").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 5000, b'{"boot_id":1}'])
def test_unreadable_key_refuses(machine: Machine, content: bytes) -> None:
    start(machine)
    (machine.runtime / "agent-ak").write_bytes(content)
    assert refused(lambda: start(machine)) == "AGENT_AK"


def test_key_that_the_log_does_not_name_refuses(machine: Machine) -> None:
    start(machine)
    state = (machine.runtime / "agent-ak").read_bytes()
    machine.tpm.restart()
    start(machine, OTHER_BOOT)
    # The other boot's key, dressed up as of this one.
    forged = json.loads(state) | {"boot_id": OTHER_BOOT, "reset_count": 2}
    (machine.runtime / "agent-ak").write_text(json.dumps(forged))
    assert refused(lambda: start(machine, OTHER_BOOT)) == "AGENT_AK"


def test_missing_platform_ak_refuses_where_none_may_be_made(machine: Machine) -> None:
    assert refused(lambda: start(machine, create=None)) == "NO_PLATFORM_AK"
    start(machine)
    assert start(machine, create=None).platform_ak


def test_agent_ak_is_of_no_use_without_its_auth(machine: Machine) -> None:
    keys = start(machine)
    state = json.loads((machine.runtime / "agent-ak").read_bytes())
    assert bytes.fromhex(state["auth"]) == keys.agent_ak.auth
    assert len(keys.agent_ak.auth) == 32
    assert (machine.runtime / "agent-ak").stat().st_mode & 0o777 == 0o600


def test_ak_certificate_is_read_and_its_padding_cut(machine: Machine) -> None:
    der = b"\x30\x05" + bytes([2, 3, 1, 2, 3])
    machine.tpm.provision_nv(AK_CERTIFICATE_INDEX, der, size=64)
    assert start(machine).platform_ak_certificate == der


@pytest.mark.parametrize("content", [b"not DER", bytes(64), b"\x30\x81\x01"])
def test_index_that_holds_no_certificate_endorses_nothing(machine: Machine, content: bytes) -> None:
    machine.tpm.provision_nv(AK_CERTIFICATE_INDEX, content, size=64)
    assert start(machine).platform_ak_certificate is None


def test_copy_of_the_key_is_of_no_use_in_another_tpm(machine: Machine) -> None:
    start(machine)
    state = json.loads((machine.runtime / "agent-ak").read_bytes())
    blob = KeyBlob(base64.b64decode(state["public"]), base64.b64decode(state["private"]))
    with running_swtpm() as other:
        commands = Commands(other.transport())
        try:
            with pytest.raises(DeviceFault):
                commands.load_agent_ak(blob, bytes.fromhex(state["auth"]))
        finally:
            commands.close()
