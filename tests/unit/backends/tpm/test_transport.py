"""Frames are whole and in time, or the transport says so and stays silent afterwards."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from cgpu_agent.backends.tpm.record import Replayer
from cgpu_agent.backends.tpm.transport import Device, UnixPerCommand, converse, open_tpm, response_code
from cgpu_agent.errors import DeviceFault, Misuse
from fixtures.fake_tpm import GET_RANDOM_4, GET_RANDOM_8, PacketTpm, answer, random_answer, stream_tpm

BROKEN_ANSWERS = {
    "no answer at all": b"",
    "half a header": b"\x80\x01\x00\x00",
    "size below a header": b"\x80\x01" + (9).to_bytes(4, "big") + bytes(4),
    "size above the limit": b"\x80\x01" + (4097).to_bytes(4, "big") + bytes(4087),
    "fewer bytes than announced": answer(bytes(8))[:-1],
    "unknown tag": b"\x80\x03" + answer()[2:],
    "TPM 1.2 tag": b"\x00\xc4" + answer()[2:],
    "error with data": answer(b"data", code=0x101),
}


def soon() -> float:
    return time.monotonic() + 5


def fault(action: object, *args: object) -> DeviceFault:
    with pytest.raises(DeviceFault) as caught:
        action(*args)  # type: ignore[operator]
    return caught.value


def test_socket_carries_one_command_a_connection() -> None:
    with stream_tpm(random_answer) as path:
        transport = UnixPerCommand(path)
        assert transport.transact(GET_RANDOM_4, soon()) == random_answer(GET_RANDOM_4)
        assert transport.transact(GET_RANDOM_8, soon()) == random_answer(GET_RANDOM_8)
        assert transport.exclusive


@pytest.mark.parametrize("reply", BROKEN_ANSWERS.values(), ids=BROKEN_ANSWERS.keys())
def test_socket_refuses_a_broken_answer(reply: bytes) -> None:
    with stream_tpm(lambda _: reply) as path:
        assert fault(UnixPerCommand(path).transact, GET_RANDOM_4, soon()).slug == "TPM_IO"


@pytest.mark.parametrize("name", [name for name, reply in BROKEN_ANSWERS.items() if reply])
def test_device_refuses_a_broken_answer_and_closes(name: str) -> None:
    tpm = PacketTpm()
    device = Device(tpm.descriptor)
    with tpm.answering(lambda _: BROKEN_ANSWERS[name]):
        assert fault(device.transact, GET_RANDOM_4, soon()).slug == "TPM_IO"
    assert fault(device.transact, GET_RANDOM_4, soon()).message == "the TPM device was closed after a failure"
    tpm.close()


def test_device_refuses_an_answer_longer_than_announced() -> None:
    tpm = PacketTpm()
    device = Device(tpm.descriptor)
    with tpm.answering(lambda command: random_answer(command) + b"\0"):
        assert fault(device.transact, GET_RANDOM_4, soon()).slug == "TPM_IO"
    tpm.close()


def test_silent_socket_runs_into_the_deadline() -> None:
    with stream_tpm(lambda _: None) as path:
        found = fault(UnixPerCommand(path).transact, GET_RANDOM_4, time.monotonic() + 0.05)
    assert found.slug == "TPM_TIMEOUT"


def test_expired_deadline_sends_nothing() -> None:
    seen: list[bytes] = []
    with stream_tpm(seen.append) as path:
        assert fault(UnixPerCommand(path).transact, GET_RANDOM_4, time.monotonic() - 1).slug == "TPM_TIMEOUT"
    assert not seen


def test_socket_with_a_full_queue_is_late_and_not_broken(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("q") / "sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(0)
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(3)]
        full = [stream.connect_ex(str(path)) for stream in waiting]
        assert any(full), "the queue never filled, so this test proves nothing"
        found = fault(UnixPerCommand(path).transact, GET_RANDOM_4, time.monotonic() + 0.05)
        for stream in waiting:
            stream.close()
    assert found.slug == "TPM_TIMEOUT"


def test_absent_socket_is_an_io_fault_that_keeps_its_cause(tmp_path: Path) -> None:
    found = fault(UnixPerCommand(tmp_path / "none").transact, GET_RANDOM_4, soon())
    assert found.slug == "TPM_IO"
    assert isinstance(found.__cause__, FileNotFoundError)
    assert str(tmp_path) not in found.message


def test_refuses_a_socket_path_that_does_not_fit() -> None:
    UnixPerCommand("/" + "x" * 106)
    with pytest.raises(Misuse) as caught:
        UnixPerCommand("/" + "x" * 107)
    assert caught.value.slug == "TPM_SPEC"


def test_absent_device_is_an_io_fault(tmp_path: Path) -> None:
    assert fault(Device, tmp_path / "tpmrm0").slug == "TPM_IO"


def test_device_carries_commands_over_one_descriptor() -> None:
    tpm = PacketTpm()
    device = Device(tpm.descriptor)
    with tpm.answering(random_answer):
        assert device.transact(GET_RANDOM_4, soon()) == random_answer(GET_RANDOM_4)
        assert device.transact(GET_RANDOM_8, soon()) == random_answer(GET_RANDOM_8)
    assert not device.exclusive
    device.close()
    device.close()
    tpm.close()


def test_device_that_went_away_is_an_io_fault() -> None:
    tpm = PacketTpm()
    device = Device(tpm.descriptor)
    tpm.close()
    found = fault(device.transact, GET_RANDOM_4, soon())
    assert found.slug == "TPM_IO"
    assert isinstance(found.__cause__, OSError)


@pytest.mark.parametrize("command", [b"", bytes(9), GET_RANDOM_4[:-1], GET_RANDOM_4 + b"\0"])
def test_no_transport_sends_a_broken_command(command: bytes) -> None:
    tpm = PacketTpm()
    device = Device(tpm.descriptor)
    for transport in (device, UnixPerCommand("/nonexistent"), Replayer([(command, answer())])):
        assert fault(transport.transact, command, soon()).slug == "TPM_IO"
    device.close()
    tpm.close()


@pytest.mark.parametrize("code", [0x922, 0x908, 0x90A])
def test_a_tpm_that_asks_for_it_gets_the_same_bytes_again(code: int) -> None:
    again = (GET_RANDOM_4, answer(code=code))
    replayer = Replayer([again, again, (GET_RANDOM_4, random_answer(GET_RANDOM_4))])
    assert converse(replayer, GET_RANDOM_4, soon()) == random_answer(GET_RANDOM_4)


def test_other_errors_are_not_repeated() -> None:
    replayer = Replayer([(GET_RANDOM_4, answer(code=0x921)), (GET_RANDOM_4, random_answer(GET_RANDOM_4))])
    assert response_code(converse(replayer, GET_RANDOM_4, soon())) == 0x921


def test_a_tpm_that_asks_for_ever_runs_into_the_deadline() -> None:
    with stream_tpm(lambda _: answer(code=0x922)) as path:
        found = fault(converse, UnixPerCommand(path), GET_RANDOM_4, time.monotonic() + 0.05)
    assert found.slug == "TPM_TIMEOUT"


def test_spec_opens_a_socket() -> None:
    with stream_tpm(random_answer) as path:
        transport = open_tpm(f"swtpm:{path}")()
        assert transport.transact(GET_RANDOM_4, soon()) == random_answer(GET_RANDOM_4)


def test_spec_sees_through_a_detour_to_the_raw_device() -> None:
    with pytest.raises(Misuse) as caught:
        open_tpm("device:/dev/../dev/tpm0")
    assert caught.value.slug == "TPM_SPEC"


def test_spec_opens_a_device_each_time_anew(tmp_path: Path) -> None:
    (tmp_path / "tpmrm0").touch()
    factory = open_tpm(f"device:{tmp_path / 'tpmrm0'}")
    first, second = factory(), factory()
    assert first is not second
    first.close()
    second.close()


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "device",
        "device:",
        "device:tpmrm0",
        "tcp:/x",
        "swtpm:relative",
        "/dev/tpmrm0",
        "swtpm:/a\0b",
        "device:/dev/tpm0",
    ],
)
def test_refuses_any_other_spec(spec: str) -> None:
    with pytest.raises(Misuse) as caught:
        open_tpm(spec)
    assert caught.value.slug == "TPM_SPEC"
