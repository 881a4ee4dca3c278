"""NVIDIA's real driver below ``CudaMemory``: the promises kept over our own library, and what only metal has."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from cgpu_agent.backends.gpu.cuda import Context
from cgpu_agent.backends.gpu.cudachannel import SLOT, CudaChannel
from cgpu_agent.errors import AgentError, DeviceFault, Exhausted, Unavailable
from fixtures.cuda import Owner, eventually
from fixtures.cudacontract import CudaMemoryContract, refused
from metal.conftest import Card
from metal.stray import ILLEGAL_ADDRESS, stray

MIB = 1 << 20
SECRET = bytes.fromhex("6b65792d6f662d736f6d65626f64792d2d7730726b6c3061642d2d2d2d2d2d21")
PAGE = 2 * MIB
"""What CUDA gives out memory in."""
HOLDER = """
import sys, time
from fixtures.cuda import Owner
owner = Owner.on(sys.argv[1])
size = int(sys.argv[2])
owner.channel().write(owner.allocate(size), 0, bytes.fromhex(sys.argv[3]) * (size // 32))
print("written", flush=True)
time.sleep(600)
"""


class TestOverNvidiasDriver(CudaMemoryContract):
    pass


@contextmanager
def held(card: Card, size: int) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that filled so much of the GPU's memory."""
    command = [sys.executable, "-c", HOLDER, card.uuid, str(size), SECRET.hex()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
            yield process
        finally:
            process.kill()


def test_all_memory_is_given_back(card: Card) -> None:
    Owner.on(card.uuid).end()  # what the driver takes for a process at first stays taken
    before = card.memory_used
    owner = Owner.on(card.uuid)
    channel, handle = owner.channel(), owner.allocate(1024 * MIB)
    channel.write(handle, 0, SECRET)
    assert card.memory_used >= before + 1024
    owner.end()
    eventually(lambda: card.memory_used <= before)


def test_a_killed_owner_keeps_no_memory(card: Card) -> None:
    before = card.memory_used
    with held(card, 1024 * MIB) as process:
        assert card.memory_used >= before + 1024
        process.send_signal(signal.SIGKILL)
        process.wait()
    eventually(lambda: card.memory_used <= before + 1)


def test_what_a_killed_owner_left_is_in_nothing_that_others_get(card: Card) -> None:
    """Nobody wiped it but the driver. Looked for in as much as can be had, at the start of each page of it."""
    with held(card, 1024 * MIB):
        pass
    context, found, pages = Context(card.uuid), 0, 0
    with context.current():
        pinned, stream, taken = context.pin(PAGE), context.stream(), []
        while True:
            try:
                taken.append(context.allocate(256 * MIB))
            except Exhausted:
                break
        for address in taken:
            for page in range(0, 256 * MIB, PAGE):
                context.to_host(pinned, address + page, len(SECRET), stream)
                while not context.idle(stream):
                    pass
                found += ctypes.string_at(pinned, len(SECRET)) == SECRET
                pages += 1
    context.destroy()
    assert pages > 4 * 1024  # more than was held, by far
    assert found == 0


def test_more_than_there_is_cannot_be_had_and_harms_nobody(owner: Owner, channel: CudaChannel) -> None:
    assert refused(lambda: owner.allocate(1 << 40), Exhausted) == "DEVICE_MEMORY"
    handle = owner.allocate(64)
    channel.write(handle, 0, SECRET)
    assert owner.read(channel, handle, 32) == SECRET


def test_a_gpu_that_is_not_there_is_none(card: Card) -> None:
    assert refused(lambda: Owner.on("GPU-00000000-0000-4000-8000-000000000000"), DeviceFault) == "GPU_LOST"


def test_a_stopped_channel_gives_up_soon_and_no_other_does(owner: Owner, channel: CudaChannel) -> None:
    size = 64 * SLOT
    other, handle = owner.channel(), owner.allocate(size)
    begun = threading.Event()

    def write() -> None:
        source = bytearray(size)
        begun.set()
        for _ in range(1000):
            channel.write(handle, 0, source)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        begun.wait()
        channel.stop()
        assert refused(writing.result, Unavailable) == "TRANSFER_STOPPED"
    assert owner.read(other, handle, 1, size - 1) == bytes(1)


def test_memory_freed_during_a_write_is_never_written_to_again(owner: Owner, channel: CudaChannel) -> None:
    size = 64 * SLOT
    other, handle = owner.channel(), owner.allocate(size)

    def write() -> None:
        source = SECRET * (size // len(SECRET))
        for _ in range(1000):
            channel.write(handle, 0, source)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        eventually(lambda: owner.read(other, handle, 32, size - 32) == SECRET)
        owner.free(handle)
        assert refused(writing.result) == "NO_ALLOCATION"
    again = owner.allocate(size)
    assert not any(owner.read(other, again, size))


def test_after_an_error_of_the_gpu_its_channels_are_dead_and_say_why(card: Card) -> None:
    owner = Owner.on(card.uuid)
    channel, handle = owner.channel(), owner.allocate(64)
    context = owner.memory._context
    assert context is not None
    with context.current():
        assert stray() == ILLEGAL_ADDRESS
    assert refused(lambda: channel.write(handle, 0, SECRET), DeviceFault) == "GPU_ERROR"
    assert refused(lambda: channel.write(handle, 0, SECRET), Unavailable) == "TRANSFER_DEAD"
    assert refused(owner.channel, DeviceFault) == "GPU_ERROR"
    assert refused(owner.end, AgentError) == "GPU_ERROR"
