"""Whatever a TPM answers, its owner gets a value or a ``DeviceFault``: no crash, no other exception."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.record import Exchange, Recorder, Replayer, load_exchanges
from cgpu_agent.errors import DeviceFault, HostileInput
from cgpu_agent.wire.tpm import PcrSelection
from fixtures.swtpm import running_swtpm

AK = 0x81000003
NV = 0x01C101D0
AUTH = b"\x11" * 32
PCRS = PcrSelection.of("sha256", range(12))


def sign(tpm: TpmCommands) -> None:
    key = tpm.load_agent_ak(tpm.create_agent_ak(AUTH), AUTH)
    tpm.quote(key, b"n", PCRS)
    tpm.certify(key, AK, b"n")


JOBS: dict[str, Callable[[TpmCommands], object]] = {
    "info": lambda tpm: tpm.info(),
    "clock": lambda tpm: tpm.clock(),
    "random": lambda tpm: tpm.random(32),
    "pcr_read": lambda tpm: tpm.pcr_read(PCRS),
    "pcr_extend": lambda tpm: tpm.pcr_extend(13, bytes(32)),
    "persistent_public": lambda tpm: tpm.persistent_public(AK),
    "create_platform_ak": lambda tpm: tpm.create_platform_ak(AK + 1, "ecc"),
    "quote": lambda tpm: tpm.quote(AK, b"n", PCRS),
    "sign": sign,
    "nv_read": lambda tpm: tpm.nv_read(NV),
    "ek_public": lambda tpm: tpm.ek_public("ecc"),
    "activate": lambda tpm: tpm.activate_credential(AK, "ecc", bytes(50), bytes(68)),
}


@pytest.fixture(scope="module")
def recordings() -> dict[str, list[Exchange]]:
    """What an honest TPM answered to each job, opening included."""
    found = {}
    with running_swtpm() as tpm:
        first = Commands(tpm.transport())
        first.create_platform_ak(AK, "rsa")
        tpm.provision_nv(NV, bytes(1500))
        first.close()
        for name, job in JOBS.items():
            recorder = Recorder(tpm.transport())
            commands = Commands(recorder)
            try:
                job(commands)
            except DeviceFault:
                assert name == "activate"
            commands.close()
            found[name] = recorder.exchanges
    return found


def replay(exchanges: list[Exchange], name: str) -> None:
    try:
        commands = Commands(Replayer(exchanges))
    except DeviceFault:
        return
    try:
        JOBS[name](commands)
    except DeviceFault:
        return
    finally:
        commands.close()


@pytest.mark.swtpm
@pytest.mark.parametrize("name", [name for name in JOBS if name not in ("activate", "create_platform_ak", "sign")])
def test_honest_answers_replay_without_a_fault(recordings: dict[str, list[Exchange]], name: str) -> None:
    commands = Commands(Replayer(recordings[name]))
    JOBS[name](commands)
    commands.close()


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[list[Exchange]], list[Exchange]]:
    """Alter one answer: flip, cut, extend or replace bytes, with the announced size true or false."""
    which = draw(st.integers(0, 1 << 16))
    where = draw(st.integers(0, 1 << 16))
    kind = draw(st.sampled_from(["flip", "cut", "extend", "set", "code"]))
    value = draw(st.binary(min_size=1, max_size=8))
    honest_size = draw(st.booleans())

    def apply(exchanges: list[Exchange]) -> list[Exchange]:
        index = which % len(exchanges)
        command, response = exchanges[index]
        frame = bytearray(response)
        at = where % len(frame)
        if kind == "flip":
            frame[at] ^= value[0] or 1
        elif kind == "cut":
            del frame[at:]
        elif kind == "extend":
            frame += value
        elif kind == "set":
            frame[at : at + len(value)] = value
        else:
            frame[6:10] = value[:4].rjust(4, b"\0")
        if honest_size and len(frame) >= 6:
            frame[2:6] = len(frame).to_bytes(4, "big")
        return [*exchanges[:index], (command, bytes(frame)), *exchanges[index + 1 :]]

    return apply


@pytest.mark.swtpm
@pytest.mark.parametrize("name", JOBS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutate=mutations())
def test_altered_answers_give_a_value_or_a_device_fault(
    recordings: dict[str, list[Exchange]], name: str, mutate: Callable[[list[Exchange]], list[Exchange]]
) -> None:
    replay(mutate(recordings[name]), name)


@given(data=st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"tpm-frames 1\n> 80\n" + tail))
def test_any_recording_file_loads_or_is_refused(data: bytes) -> None:
    try:
        load_exchanges(data)
    except HostileInput:
        return
