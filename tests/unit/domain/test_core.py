"""The agent's state as an operator sees it: true at every moment, with a reason and a remedy."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.backends.logs import MAX_LOG
from cgpu_agent.domain.core import REMEDIES, Core, is_final
from cgpu_agent.domain.keys import AK_CERTIFICATE_INDEX
from cgpu_agent.errors import AgentError, DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.verifier.keys import load_attestation_key
from fixtures.gpusessions import site
from fixtures.machine import AGENT, REGISTER, WORKLOAD, Machine, judge, request
from fixtures.pki import NOW, Authority
from fixtures.softwaregpu import running_gpus

pytestmark = pytest.mark.swtpm


def reasons(core: Core) -> list[str]:
    return [problem.reason for problem in core.problems()]


def test_agent_that_never_reached_its_tpm_is_starting(machine: Machine) -> None:
    async def scenario() -> None:
        machine.tpm.kill()
        async with machine.agent() as core:
            assert (core.state(), core.line(), core.problems()) == ("starting", "Starting", [])
            with pytest.raises(DeviceFault):
                await core.establish()
            assert core.state() == "starting"
            assert not core.ready()
            assert core.line() == f"Starting: {core.problems()[0].message}"
            assert reasons(core) == ["TPM_IO"]
            for ask in (lambda: core.boot, lambda: core.evidence):
                with pytest.raises(Unavailable) as caught:
                    ask()
                assert caught.value.slug == "NOT_READY"
                assert caught.value.retry_after
            machine.tpm.start()
            await core.establish()
            assert core.ready()

    asyncio.run(scenario())


def test_agent_that_serves_says_so_and_what_is_weak(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving(identity_strength="pid") as core:
            assert core.state() == "degraded"
            assert core.ready()
            assert reasons(core) == ["UNENDORSED", "WEAK_IDENTITY"]
            assert core.line() == "Serving: TPM IBM, AK unendorsed, boot log present"
            assert all(problem.remedy for problem in core.problems())

    asyncio.run(scenario())


def test_agent_that_callers_could_have_killed_says_so(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving(short_of_memory="too little") as core:
            problem = core.problems()[-1]
            assert (problem.reason, problem.message) == ("MEMORY_BOUND", "too little")
            assert problem.remedy

    asyncio.run(scenario())


def test_certified_agent_with_a_boot_log_has_no_problems(machine: Machine) -> None:
    machine.tpm.provision_nv(AK_CERTIFICATE_INDEX, b"\x30\x03\x02\x01\x05")

    async def scenario() -> None:
        async with machine.serving() as core:
            assert (core.state(), core.problems()) == ("serving", [])
            assert core.line() == "Serving: TPM IBM, AK certified, boot log present"

    asyncio.run(scenario())


def test_machine_without_a_boot_log_is_shown_as_one(machine: Machine) -> None:
    machine.boot_log = Path("/nonexistent")

    async def scenario() -> None:
        async with machine.serving() as core:
            assert "NO_BOOT_LOG" in reasons(core)
            assert core.line().endswith("no boot log")
            bundle = await core.evidence.get(WORKLOAD, asked := request())
            refusal = judge(bundle, asked.nonce).refusal
            assert refusal is not None
            assert refusal.slug == "NO_BOOT_LOG"
            assert judge(bundle, asked.nonce, allow_no_boot_log=True).accepted

    asyncio.run(scenario())


def test_boot_log_that_is_too_large_is_a_problem_and_no_crash(machine: Machine, tmp_path: Path) -> None:
    machine.boot_log = tmp_path / "log"
    machine.boot_log.write_bytes(bytes(MAX_LOG + 1))

    async def scenario() -> None:
        async with machine.serving() as core:
            assert reasons(core)[0] == "LOG_TOO_LARGE"
            assert core.line().endswith("boot log too large")
            assert core.state() == "degraded"
            with pytest.raises(Unavailable) as caught:
                await core.evidence.get(WORKLOAD, request())
            assert caught.value.slug == "LOG_TOO_LARGE"

    asyncio.run(scenario())


def test_refusal_is_a_state_of_its_own(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            machine.tpm.restart()
            with pytest.raises(Unavailable):
                await core.boot.probe()
            assert core.state() == "refusing"
            assert not core.ready()
            assert core.line().startswith("Refusing evidence: the TPM was reset")
            assert core.problems()[0].remedy == "reboot the VM"

    asyncio.run(scenario())


def test_a_boot_that_does_not_stand_any_more_is_not_trusted_with_keys(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.agent() as core:
            assert not core.trusted()
            await core.establish()
            assert core.trusted()
            machine.tpm.restart()
            with contextlib.suppress(AgentError):
                await core.boot.probe()
            assert core.boot.refusal is not None
            assert not core.trusted()
        async with machine.agent() as core:
            core.stop()
            assert not core.trusted()

    asyncio.run(scenario())


def test_refusal_at_start_is_kept_and_told_to_every_caller(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving():
            pass
        machine.tpm.restart()
        async with machine.agent() as core:
            with pytest.raises(Unavailable) as caught:
                await core.establish()
            assert is_final(caught.value)
            assert core.state() == "refusing"
            told = []
            for _ in range(2):
                with pytest.raises(Unavailable) as refused:
                    _ = core.boot
                told.append(refused.value)
            assert told[0] is not told[1]  # one raised for ever would keep every traceback
            assert {error.slug for error in told} == {"TPM_RESET_DETECTED"}

    asyncio.run(scenario())


def test_tpm_out_of_reach_shows_while_it_lasts(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            away = machine.tpm.data_socket.rename(machine.tpm.directory / "away")
            with pytest.raises(DeviceFault):
                await core.evidence.get(WORKLOAD, request())
            assert core.state() == "degraded"
            assert not core.ready()
            assert core.line().startswith("Waiting for the TPM: ")
            assert reasons(core)[0] == "TPM_IO"
            away.rename(machine.tpm.data_socket)
            await core.boot.probe()
            assert core.ready()
            assert core.line().startswith("Serving: ")

    asyncio.run(scenario())


def test_stopping_agent_says_so(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            core.stop()
            assert (core.state(), core.line(), core.ready()) == ("stopping", "Stopping", False)

    asyncio.run(scenario())


def test_establishing_twice_records_one_start(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.agent() as core:
            await asyncio.gather(core.establish(), core.establish())
            assert len(core.boot.log.records) == 2

    asyncio.run(scenario())


def test_reload_while_starting_is_not_forgotten(machine: Machine) -> None:
    changed = {**AGENT, "config": "55" * 32}

    async def scenario() -> None:
        async with machine.agent() as core:
            starting = asyncio.create_task(core.establish())
            await asyncio.sleep(0)
            await core.reloaded(changed)
            await starting
            bundle = await core.evidence.get(WORKLOAD, asked := request())
            result = judge(bundle, asked.nonce)
            assert result.manifest is not None
            assert dict(result.manifest.agent) == changed
            assert b"55" * 32 in result.records[-1].content

    asyncio.run(scenario())


def test_reload_between_measuring_the_start_and_serving_is_not_forgotten(machine: Machine) -> None:
    changed = {**AGENT, "config": "66" * 32}

    async def scenario() -> None:
        async with machine.agent() as core:
            asked_for_change = asyncio.Event()
            loop = asyncio.get_running_loop()
            extend_log = core.store.append

            def append(name: str, data: bytes, *, at: int) -> None:
                if at:  # the start is being measured
                    loop.call_soon_threadsafe(asked_for_change.set)
                extend_log(name, data, at=at)

            core.store.append = append  # type: ignore[method-assign]
            starting = asyncio.create_task(core.establish())
            await asked_for_change.wait()
            await core.reloaded(changed)
            await starting
            assert core.evidence.agent == changed
            assert b"66" * 32 in core.boot.log.records[-1].content

    asyncio.run(scenario())


def test_caller_during_the_start_waits_for_it_and_then_is_served(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.agent() as core:
            early = asyncio.create_task(core.started())
            await asyncio.sleep(0)
            assert not early.done()
            await core.establish()
            await early
            assert core.ready()

    asyncio.run(scenario())


def test_caller_during_a_start_that_fails_or_takes_long_is_told_so(machine: Machine) -> None:
    async def scenario() -> None:
        machine.tpm.kill()
        async with machine.agent() as core:
            early = asyncio.create_task(core.started())
            with pytest.raises(DeviceFault):
                await core.establish()
            await early
        async with machine.agent(request_seconds=0.01) as core:
            await core.started()  # nobody even tried
            with pytest.raises(Unavailable) as caught:
                _ = core.boot
            assert caught.value.slug == "NOT_READY"

    asyncio.run(scenario())


def test_state_directory_without_room_is_waited_for(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.agent() as core:
            real = core.store.write

            def full(name: str, data: bytes) -> None:
                raise Unavailable("STATE_DIRECTORY", "no room", retry_after=5.0)

            core.store.write = full  # type: ignore[method-assign]
            with pytest.raises(Unavailable) as caught:
                await core.establish()
            assert not is_final(caught.value)
            assert (core.state(), reasons(core)) == ("starting", ["STATE_DIRECTORY"])
            core.store.write = real  # type: ignore[method-assign]
            await core.establish()
            assert core.ready()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (DeviceFault("TPM_IO", "m"), False),
        (Unavailable("X", "m", retry_after=1.0), False),
        (Unavailable("TPM_RESET_DETECTED", "m"), True),
        (HostileInput("BAD_JSON", "m"), True),
        (Misuse("TPM_ARGUMENT", "m"), True),
    ],
)
def test_errors_that_time_does_not_mend_are_final(error: AgentError, final: bool) -> None:
    assert is_final(error) is final


def test_every_remedy_is_a_sentence() -> None:
    assert all(slug.isupper() and len(remedy) > 8 for slug, remedy in REMEDIES.items())


def test_foreign_extend_is_told_from_a_reset(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving():
            pass

        def extend(tpm: TpmCommands) -> None:
            tpm.pcr_extend(REGISTER, bytes(32))

        async with machine.agent() as core:
            await core.tpm.run(extend, timeout=30)
            with pytest.raises(Unavailable) as caught:
                await core.establish()
            assert caught.value.slug == "AGENT_LOG_DIVERGED"
            assert core.state() == "refusing"
            assert "PCR 13" in core.line()
            assert dataclasses.asdict(core.problems()[0])["remedy"] == REMEDIES["AGENT_LOG_DIVERGED"]

    asyncio.run(scenario())


def test_configured_certificate_of_the_platform_ak_endorses_it(machine: Machine) -> None:
    authority = Authority.root()

    async def scenario() -> None:
        async with machine.serving() as core:
            key = load_attestation_key(core.boot.keys.platform_ak).key
            certificate = authority.issue(key).public_bytes(Encoding.DER)
            core.certify(certificate)
            assert (core.problems(), core.boot.keys.platform_ak_certificate) == ([], certificate)
            bundle = await core.evidence.get(WORKLOAD, asked := request())
            verdict = judge(bundle, asked.nonce, allow_unendorsed=False, roots=[authority.certificate], at=NOW)
            assert verdict.accepted, verdict.refusal
            core.certify(None)
            assert core.boot.keys.platform_ak_certificate == certificate

    asyncio.run(scenario())


def test_certificate_that_the_platform_renewed_in_nv_is_taken_over_and_another_keys_is_not(machine: Machine) -> None:
    authority, stranger = Authority.root(), Authority.root()

    async def scenario() -> None:
        async with machine.serving() as core:
            key = load_attestation_key(core.boot.keys.platform_ak).key
            old, new = (authority.issue(key).public_bytes(Encoding.DER) for _ in range(2))
            assert not await core.renew()  # there is none
            machine.tpm.provision_nv(AK_CERTIFICATE_INDEX, b"", size=1024)
            expected = None
            for content, after in (
                (old, old),
                (old, old),
                (stranger.certificate.public_bytes(Encoding.DER), old),
                (b"no certificate", old),
                (new, new),
            ):
                machine.tpm.fill_nv(AK_CERTIFICATE_INDEX, content.ljust(1024, b"\0"))
                assert await core.renew() is (expected != after)
                assert core.boot.keys.platform_ak_certificate == after
                expected = after
            core.certify(old)
            assert not await core.renew()  # the operator's word counts
            assert core.boot.keys.platform_ak_certificate == old

    asyncio.run(scenario())


@pytest.mark.parametrize("whose", ["another key's", "nobody's"])
def test_configured_certificate_that_does_not_fit_is_shown_and_not_used(machine: Machine, whose: str) -> None:
    other = Authority.root()
    unfit = other.certificate.public_bytes(Encoding.DER) if whose == "another key's" else b"\x30\x03\x02\x01\x05"

    async def scenario() -> None:
        async with machine.agent() as core:
            core.certify(unfit)
            await core.establish()
            assert core.boot.keys.platform_ak_certificate is None
            assert "UNENDORSED" in reasons(core)
            assert core.problems()[0].message.startswith("tpm.ak_certificate is not used: ")
            bundle = await core.evidence.get(WORKLOAD, asked := request())
            assert judge(bundle, asked.nonce).accepted

    asyncio.run(scenario())


def test_gpus_that_are_not_ready_are_a_problem_a_fact_and_part_of_the_line(machine: Machine) -> None:
    async def scenario() -> None:
        with running_gpus("--count", "1") as process:
            async with machine.serving() as core, site(process) as here:
                assert core.facts().gpus == "not-asked"
                core.gpus = here.sessions
                assert core.facts().gpus == "not-ready"  # nobody has looked yet whether there are any
                assert not core.trusted()
                await here.tick()
                assert core.facts().gpus == "ready"
                assert core.trusted()
                assert core.line().endswith(", 1/1 simulated GPUs trusted 0 min ago")
                here.clock.pass_by(61.0)
                assert core.line().endswith(", 1/1 simulated GPUs trusted 1 min ago")
                assert not [reason for reason in reasons(core) if reason.startswith("GPU")]
                await here.bad("cc-off")
                await here.tick()
                await here.tick(12.0)
                assert core.facts().gpus == "not-ready"
                assert not core.trusted()
                assert "GPU_CC_OFF" in reasons(core)
                assert "GPUs not ready: confidential computing is not on" in core.line()
                assert core.ready()  # boot evidence does not wait for GPUs

    asyncio.run(scenario())
