"""What was recorded comes back, in order; anything else is refused."""

from __future__ import annotations

import time

import pytest

from cgpu_agent.backends.tpm.record import Recorder, Replayer, dump_exchanges, load_exchanges
from cgpu_agent.backends.tpm.transport import UnixPerCommand
from cgpu_agent.errors import DeviceFault, HostileInput
from fixtures.fake_tpm import GET_RANDOM_4, GET_RANDOM_8, answer, random_answer, stream_tpm

PAIRS = [(GET_RANDOM_4, random_answer(GET_RANDOM_4)), (GET_RANDOM_8, random_answer(GET_RANDOM_8))]


def soon() -> float:
    return time.monotonic() + 5


def test_recording_replays_without_the_tpm() -> None:
    with stream_tpm(random_answer) as path:
        recorder = Recorder(UnixPerCommand(path))
        for command, _ in PAIRS:
            recorder.transact(command, soon())
        recorder.close()
    replayer = Replayer(load_exchanges(dump_exchanges(recorder.exchanges)), exclusive=recorder.exclusive)
    assert [replayer.transact(command, soon()) for command, _ in PAIRS] == [frame for _, frame in PAIRS]


def test_file_format_is_the_documented_one() -> None:
    assert dump_exchanges([(b"\x80\x01", b"\xab")]) == b"tpm-frames 1\n> 8001\n< ab\n"
    assert load_exchanges(b"tpm-frames 1\n> 8001\n< ab\n") == ((b"\x80\x01", b"\xab"),)
    assert load_exchanges(dump_exchanges([])) == ()


def test_replay_refuses_a_command_out_of_order() -> None:
    replayer = Replayer(PAIRS)
    with pytest.raises(DeviceFault) as caught:
        replayer.transact(GET_RANDOM_8, soon())
    assert caught.value.slug == "TPM_IO"


def test_replay_ends_with_the_recording() -> None:
    replayer = Replayer(PAIRS[:1])
    replayer.transact(GET_RANDOM_4, soon())
    with pytest.raises(DeviceFault) as caught:
        replayer.transact(GET_RANDOM_4, soon())
    assert caught.value.slug == "TPM_IO"


def test_replay_refuses_a_recorded_frame_that_is_broken() -> None:
    with pytest.raises(DeviceFault) as caught:
        Replayer([(GET_RANDOM_4, answer() + b"\0")]).transact(GET_RANDOM_4, soon())
    assert caught.value.slug == "TPM_IO"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"tpm-frames 2\n",
        b"tpm-frames 1",
        b"tpm-frames 1\n> 80\n",
        b"tpm-frames 1\n< 80\n> 80\n",
        b"tpm-frames 1\n> 8\n< 80\n",
        b"tpm-frames 1\n> 8G\n< 80\n",
        b"tpm-frames 1\n> 80 \n< 80\n",
        b"tpm-frames 1\n> \n< 80\n",
        b"tpm-frames 1\n> 80\n< 80\n\n",
        b"tpm-frames 1\r\n> 80\r\n< 80\r\n",
        b"tpm-frames 1\n> \xff\n< 80\n",
        b"tpm-frames 1\n" + b"> 80\n< 80\n" * (2 << 20),
    ],
)
def test_refuses_a_file_of_another_format(data: bytes) -> None:
    with pytest.raises(HostileInput) as caught:
        load_exchanges(data)
    assert caught.value.slug == "BAD_RECORDING"
