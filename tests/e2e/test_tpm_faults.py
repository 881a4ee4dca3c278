"""A TPM that dies, hangs, resets or runs full: each fault is named, bounded in time, and healed where it can be."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cgpu_agent.backends.base import LoadedKey, TpmCommands
from cgpu_agent.backends.tpm import keys
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.esapi import Esapi
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.errors import DeviceFault, Misuse
from cgpu_agent.wire.tpm import ALG_SHA256, PcrSelection, parse_attest

pytestmark = pytest.mark.swtpm

AUTH = b"agent's secret 0123456789"
PLATFORM_AK = 0x81000003
PCRS = PcrSelection.of("sha256", range(24))
LIMIT = 30.0


@asynccontextmanager
async def owning(tpm: Swtpm) -> AsyncIterator[TpmOwner]:
    owner = TpmOwner(tpm.transport)
    try:
        yield owner
    finally:
        owner.close()


def draw(tpm: TpmCommands) -> int:
    return len(tpm.random(16))


def make_agent_ak(tpm: TpmCommands) -> LoadedKey:
    return tpm.load_agent_ak(tpm.create_agent_ak(AUTH), AUTH)


def reset_without_startup(tpm: Swtpm) -> None:
    """CMD_INIT on swtpm's control channel: what ``swtpm_ioctl -i`` sends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.connect(f"{tpm.data_socket}.ctrl")
        control.sendall(struct.pack(">II", 2, 0))
        assert control.recv(4) == bytes(4)


async def fails(owner: TpmOwner, job: object, *, timeout: float = LIMIT, idempotent: bool = True) -> DeviceFault:
    with pytest.raises(DeviceFault) as caught:
        await owner.run(job, timeout=timeout, idempotent=idempotent)  # type: ignore[arg-type]
    return caught.value


def test_killed_in_the_middle_of_a_command_and_started_again(swtpm: Swtpm) -> None:
    began = threading.Event()

    def slow(tpm: TpmCommands) -> None:
        for handle in range(0x81000100, 0x81000110):
            began.set()
            tpm.create_platform_ak(handle, "rsa")

    async def scenario() -> None:
        async with owning(swtpm) as owner:
            job = asyncio.create_task(fails(owner, slow, idempotent=False))
            await asyncio.to_thread(began.wait)
            swtpm.kill()
            found = await job
            assert (found.slug, found.outcome_unknown) == ("TPM_IO", True)
            assert (await fails(owner, draw)).slug == "TPM_IO"
            swtpm.start()
            assert await owner.run(draw, timeout=LIMIT) == 16

    asyncio.run(scenario())


def test_hung_tpm_fails_each_job_in_its_time_and_heals_when_it_goes_on(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm) as owner:
            assert await owner.run(draw, timeout=LIMIT) == 16
            assert swtpm.pid is not None
            os.kill(swtpm.pid, signal.SIGSTOP)
            # More than its listen queue holds.
            for _ in range(5):
                assert (await fails(owner, draw, timeout=0.05)).slug == "TPM_TIMEOUT"
            os.kill(swtpm.pid, signal.SIGCONT)
            assert await owner.run(draw, timeout=LIMIT) == 16

    asyncio.run(scenario())


def test_event_loop_lives_while_the_tpm_hangs(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm) as owner:
            assert swtpm.pid is not None
            os.kill(swtpm.pid, signal.SIGSTOP)
            job = asyncio.create_task(fails(owner, draw, timeout=0.2))
            turns = 0
            while not job.done():
                await asyncio.sleep(0.001)
                turns += 1
            os.kill(swtpm.pid, signal.SIGCONT)
            assert (await job).slug == "TPM_TIMEOUT"
            assert turns > 10

    asyncio.run(scenario())


def test_extend_that_hangs_has_an_unknown_outcome(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm) as owner:
            assert swtpm.pid is not None
            os.kill(swtpm.pid, signal.SIGSTOP)
            found = await fails(owner, lambda tpm: tpm.pcr_extend(13, bytes(32)), timeout=1.0, idempotent=False)
            os.kill(swtpm.pid, signal.SIGCONT)
            assert (found.slug, found.outcome_unknown) == ("TPM_TIMEOUT", True)

    asyncio.run(scenario())


def test_reset_under_a_live_context_is_reported_and_not_papered_over(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm) as owner:
            before = await owner.run(lambda tpm: tpm.clock(), timeout=LIMIT)
            key = await owner.run(make_agent_ak, timeout=LIMIT)
            await owner.run(lambda tpm: tpm.pcr_extend(13, bytes(32)), timeout=LIMIT, idempotent=False)
            reset_without_startup(swtpm)
            assert (await fails(owner, draw)).slug == "TPM_RESET"
            after = await owner.run(lambda tpm: tpm.clock(), timeout=LIMIT)
            assert after.reset_count == before.reset_count + 1
            pcr13 = await owner.run(lambda tpm: tpm.pcr_read(PcrSelection.of("sha256", [13])), timeout=LIMIT)
            assert pcr13 == {13: bytes(32)}
            found = await fails(owner, lambda tpm: tpm.quote(key, b"n", PCRS))
            assert found.slug == "TPM_RESET", "a key of the boot before is gone, not broken"
            assert await owner.run(draw, timeout=LIMIT) == 16

    asyncio.run(scenario())


def test_restart_between_jobs_makes_loaded_keys_stale(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm) as owner:
            await owner.run(lambda tpm: tpm.create_platform_ak(PLATFORM_AK, "ecc"), timeout=LIMIT)
            key = await owner.run(make_agent_ak, timeout=LIMIT)
            swtpm.restart()
            assert (await fails(owner, lambda tpm: tpm.quote(key, b"n", PCRS))).slug == "TPM_RESET"
            signed = await owner.run(lambda tpm: tpm.quote(PLATFORM_AK, b"n", PCRS), timeout=LIMIT)
            assert parse_attest(signed.attest).clock_info.reset_count == 2

    asyncio.run(scenario())


def test_objects_that_others_left_are_cleared_away_once(swtpm: Swtpm) -> None:
    commands = Commands(swtpm.transport())
    key = make_agent_ak(commands)
    other = Esapi(swtpm.transport(), command_timeout=LIMIT)
    for _ in range(3):
        other.create_primary(keys.storage_parent())
    with pytest.raises(DeviceFault) as caught:
        other.create_primary(keys.storage_parent())
    assert caught.value.slug == "TPM_BUSY"
    assert commands.quote(key, b"n", PCRS).attest
    commands.close()
    other.close()


def test_sessions_that_others_left_are_cleared_away_once(swtpm: Swtpm) -> None:
    commands = Commands(swtpm.transport())
    commands.create_platform_ak(PLATFORM_AK, "ecc")
    other = Esapi(swtpm.transport(), command_timeout=LIMIT)
    for _ in range(3):
        other.start_policy_session(ALG_SHA256)
    with pytest.raises(DeviceFault) as caught:
        other.start_policy_session(ALG_SHA256)
    assert caught.value.slug == "TPM_BUSY"
    # Refused for its content: the session it needs was found.
    with pytest.raises(DeviceFault) as caught:
        commands.activate_credential(PLATFORM_AK, "ecc", bytes(50), b"\0\x20" + bytes(32) + b"\0\x20" + bytes(32))
    assert caught.value.slug == "TPM_ERROR"
    commands.close()
    other.close()


def test_saved_sessions_that_others_left_are_cleared_away_once(swtpm: Swtpm) -> None:
    commands = Commands(swtpm.transport())
    commands.create_platform_ak(PLATFORM_AK, "ecc")
    other = Esapi(swtpm.transport(), command_timeout=LIMIT)
    for _ in range(64):
        other.context_save(other.start_policy_session(ALG_SHA256))
    with pytest.raises(DeviceFault) as caught:
        other.start_policy_session(ALG_SHA256)
    assert caught.value.slug == "TPM_BUSY"
    with pytest.raises(DeviceFault) as caught:
        commands.activate_credential(PLATFORM_AK, "ecc", bytes(50), b"\0\x20" + bytes(32) + b"\0\x20" + bytes(32))
    assert caught.value.slug == "TPM_ERROR"
    commands.close()
    other.close()


def test_full_nv_memory_is_named(swtpm: Swtpm) -> None:
    commands = Commands(swtpm.transport())

    def fill_with_data() -> None:
        for index in range(0x01C10000, 0x01C10100):
            swtpm.provision_nv(index, bytes(2048))

    def fill_with_keys() -> None:
        for handle in range(0x81000100, 0x81000200):
            commands.create_platform_ak(handle, "ecc")

    for fill in (fill_with_data, fill_with_keys):
        with pytest.raises(DeviceFault) as caught:
            fill()
        assert caught.value.slug == "TPM_NV_FULL"
    assert draw(commands) == 16
    commands.close()


def test_wrong_auths_lock_no_key_of_ours(swtpm: Swtpm) -> None:
    commands = Commands(swtpm.transport())
    key = make_agent_ak(commands)
    wrong = LoadedKey(key.context, key.public, b"not the secret 0123456789")
    for _ in range(5):
        with pytest.raises(DeviceFault) as caught:
            commands.quote(wrong, b"n", PCRS)
        assert caught.value.slug == "TPM_AUTH"
    assert commands.quote(key, b"n", PCRS).attest
    commands.close()


def test_power_cuts_lock_no_key_of_ours(swtpm: Swtpm) -> None:
    commands = Commands(swtpm.transport())
    blob = commands.create_agent_ak(AUTH)
    for _ in range(5):
        assert commands.quote(commands.load_agent_ak(blob, AUTH), b"n", PCRS).attest
        swtpm.kill()
        swtpm.start()
    commands.close()


def test_truncated_state_fails_the_start_and_is_left_for_inspection(swtpm: Swtpm) -> None:
    swtpm.stop()
    state = swtpm.directory / "tpm2-00.permall"
    broken = state.read_bytes()[:100]
    state.write_bytes(broken)
    with pytest.raises(DeviceFault) as caught:
        swtpm.start()
    assert caught.value.slug == "SWTPM_FAILED"
    assert state.read_bytes() == broken


def test_tpm_that_accepts_and_closes_is_an_io_fault_every_time(swtpm: Swtpm) -> None:
    swtpm.kill()
    swtpm.data_socket.unlink()

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(swtpm.data_socket))
            listener.listen()
            thread = threading.Thread(target=serve, args=(listener,), daemon=True)
            thread.start()
            async with owning(swtpm) as owner:
                for _ in range(3):
                    assert (await fails(owner, draw)).slug == "TPM_IO"
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()

    asyncio.run(scenario())


def test_qualifying_data_that_only_an_emulator_takes_is_refused(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm) as owner:
            await owner.run(lambda tpm: tpm.create_platform_ak(PLATFORM_AK, "ecc"), timeout=LIMIT)
            assert await owner.run(lambda tpm: tpm.quote(PLATFORM_AK, bytes(48), PCRS), timeout=LIMIT)
            with pytest.raises(Misuse):
                await owner.run(lambda tpm: tpm.quote(PLATFORM_AK, bytes(49), PCRS), timeout=LIMIT)

    asyncio.run(scenario())
