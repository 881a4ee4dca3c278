"""The SDK's side of transfers: what lies in memory on lease, what is a buffer, which numbers a message holds."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.client import calls
from cgpu_agent.client.lease import LeasedMemory
from cgpu_agent.client.transfer import Memory, _bytes
from cgpu_agent.errors import Misuse
from cgpu_agent.wire.lease import LeaseRequest, encode_grant

SIZE = 8192


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """Memory that somebody leased who listens where the agent should."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "lease.sock"))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                assert LeaseRequest.parse(sock.recv(512)) == LeaseRequest(SIZE, source=False, writable=True)
                fd = os.memfd_create("test")
                os.ftruncate(fd, SIZE)
                socket.send_fds(sock, [encode_grant(bytes(16))], [fd])
                os.close(fd)
                sock.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        made = Memory(LeasedMemory(str(tmp_path / "lease.sock"), SIZE, None, 10.0))
        yield made
        made.close()
        thread.join()


def test_what_lies_in_leased_memory_is_found_there(memory: Memory) -> None:
    numbers = memory.view[16:816].cast("d")
    assert memory.offset_of(_bytes(numbers)) == 16
    assert memory.offset_of(memory.view) == 0
    assert memory.offset_of(memory.view[SIZE - 1 :]) == SIZE - 1
    assert memory.offset_of(memoryview(bytes(16))) is None
    assert memory.offset_of(memoryview(bytearray(SIZE))) is None
    numbers.release()


def test_nothing_lies_in_memory_whose_lease_has_ended(memory: Memory) -> None:
    part = memory.view[:16]
    memory.close()
    assert memory.offset_of(part) is None


@pytest.mark.parametrize("bad", [b"", "text", 7, None, memoryview(bytes(9))[::3], [1, 2]])
def test_what_is_no_plain_buffer_is_said_to_be_none(bad: object) -> None:
    with pytest.raises(Misuse) as raised:
        _bytes(bad)
    assert raised.value.slug == "BAD_BUFFER"


def test_a_buffer_of_any_shape_is_its_bytes() -> None:
    numbers = array.array("d", [1.5, 2.5])
    view = _bytes(numbers)
    view[:8] = array.array("d", [7.0]).tobytes()
    assert numbers[0] == 7.0
    assert bytes(_bytes(memoryview(bytes(range(12))).cast("B", (3, 4)))) == bytes(range(12))


def test_numbers_that_no_message_holds_are_refused_here() -> None:
    copy = calls.Copy(True, bytes(16), -1, 1, 0, 1)
    for make in (
        lambda: calls.allocate(b"", 1 << 64),
        lambda: calls.free(b"", -1),
        lambda: calls.free(b"", 1 << 32),
        lambda: calls.submit(b"", [copy]),
        lambda: calls.load_sealed(b"", "key", b"", "object", -1, 4096, 1),
        lambda: calls.synchronize(b"", -1, 0),
        lambda: calls.watch_transfers(b"", 1 << 64),
    ):
        with pytest.raises(Misuse) as raised:
            make()
        assert raised.value.slug == "BAD_NUMBER"


def test_a_gpu_is_named_by_its_place() -> None:
    gpus = gpus_pb2.GpuSet(gpus=[gpus_pb2.Gpu(uuid="GPU-a"), gpus_pb2.Gpu(uuid="GPU-b")])
    assert calls.uuid_of(gpus, 1) == "GPU-b"
    for place in (2, -1):
        with pytest.raises(Misuse) as raised:
            calls.uuid_of(gpus, place)
        assert raised.value.slug == "UNKNOWN_GPU"
