"""Channels to a software GPU's memory: what they move, what it refuses, how they end, and the engine over them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cgpu_agent.backends.gpu.software import commands
from cgpu_agent.backends.gpu.software.transferdevice import MAX_ALLOCATIONS, MAX_CHANNELS, MAX_MEMORY, door_of
from cgpu_agent.errors import AgentError, DeviceFault, Exhausted, Unavailable
from cgpu_agent.transfer.channel import Channel
from cgpu_agent.transfer.engine import MAX_WAITING, Engine
from cgpu_agent.transfer.ring import make_ring
from cgpu_agent.wire.transfer import MAX_PACKED, SLOT_SIZE
from fixtures import soak
from fixtures.softwaregpu import PATIENCE, GpuProcess, running_gpus
from fixtures.transfer import Host, Session, await_rings, descriptors, rings_of, session

ROOM = 3 * SLOT_SIZE


@pytest.fixture(scope="module")
def process() -> Iterator[GpuProcess]:
    with running_gpus() as gpus:
        yield gpus


@pytest.fixture
def site(process: GpuProcess) -> Iterator[Session]:
    with session(process) as made:
        yield made


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(AgentError) as caught:
        work()
    return caught.value.slug


def content(channel: Channel, handle: int, size: int = ROOM) -> bytes:
    out = bytearray(size)
    channel.read_into(handle, 0, out)
    return bytes(out)


def test_bytes_come_back(site: Session) -> None:
    handle, channel = site.allocate(ROOM), site.channel()
    assert content(channel, handle) == bytes(ROOM)
    expected = bytearray(ROOM)
    for offset, size in ((0, ROOM), (1, 1), (5, SLOT_SIZE), (7, SLOT_SIZE + 1), (ROOM - 3, 3)):
        data = os.urandom(size)
        channel.write(handle, offset, data)
        expected[offset : offset + size] = data
        assert content(channel, handle) == expected
    assert channel.dead is None


def test_many_small_copies_take_few_slots(site: Session) -> None:
    handle, channel = site.allocate(ROOM), site.channel()
    copies = [(handle, 100 * index, os.urandom(1 + index % 100)) for index in range(12 * MAX_PACKED // 2)]
    channel.write_many(copies)
    found = content(channel, handle)
    assert all(found[offset : offset + len(data)] == data for _, offset, data in copies)
    assert channel._duplex.sealer._keys.counter == 6 + 1


def test_more_slots_of_small_copies_than_the_ring_holds(site: Session) -> None:
    handle, channel = site.allocate(ROOM), site.channel()
    pieces = [os.urandom(SLOT_SIZE // 2) for _ in range(40)]
    channel.write_many([(handle, 0, piece) for piece in pieces])
    assert content(channel, handle, SLOT_SIZE // 2) == pieces[-1]


def test_two_allocations_and_two_channels(site: Session) -> None:
    one, other = site.allocate(9), site.allocate(9)
    first, second = site.channel(), site.channel()
    first.write(one, 0, b"for one..")
    second.write(other, 0, b"for other")
    assert content(second, one, 9) == b"for one.."
    assert content(first, other, 9) == b"for other"


def test_what_a_device_refuses_does_not_end_a_channel(site: Session) -> None:
    handle, channel = site.allocate(ROOM), site.channel()
    channel.write(handle, 0, b"before")
    assert refusal(lambda: channel.write(handle + 1, 0, b"x")) == "NO_ALLOCATION"
    assert refusal(lambda: channel.write(handle, 1, bytes(ROOM))) == "DEVICE_RANGE"
    assert refusal(lambda: channel.read_into(handle, ROOM, bytearray(1))) == "DEVICE_RANGE"
    assert refusal(lambda: channel.read_into(handle + 1, 0, bytearray(1))) == "NO_ALLOCATION"
    assert refusal(lambda: channel.write_many([(handle, 0, b"x"), (handle, ROOM, b"y")])) == "DEVICE_RANGE"
    assert content(channel, handle) == b"before" + bytes(ROOM - 6)  # not even the first of the two


def test_calls_that_make_no_sense_touch_nothing(site: Session) -> None:
    channel = site.channel()
    for work in (
        lambda: channel.write(1, 0, b""),
        lambda: channel.read_into(1, 0, bytearray()),
        lambda: channel.write_many([(1, 0, b"")]),
        lambda: channel.write_many([(1, 0, bytes(SLOT_SIZE - 15))]),
    ):
        assert refusal(work) == "BAD_COPY"
    for handle, offset, slug in (
        (-1, 0, "NO_ALLOCATION"),
        (1 << 32, 0, "NO_ALLOCATION"),
        (1, -1, "DEVICE_RANGE"),
        (1, 1 << 64, "DEVICE_RANGE"),
    ):
        assert refusal(lambda handle=handle, offset=offset: channel.write(handle, offset, b"x")) == slug  # type: ignore[misc]
        assert refusal(lambda handle=handle, offset=offset: channel.write_many([(handle, offset, b"x")])) == slug  # type: ignore[misc]
        assert refusal(lambda handle=handle, offset=offset: channel.read_into(handle, offset, bytearray(1))) == slug  # type: ignore[misc]
    assert channel._duplex.sealer._keys.counter == 0
    assert channel.dead is None


def test_freed_memory_is_gone(site: Session) -> None:
    handle, channel = site.allocate(9), site.channel()
    site.run(site.transfers.free(handle, timeout=PATIENCE))
    assert refusal(lambda: channel.write(handle, 0, b"x")) == "NO_ALLOCATION"
    assert refusal(lambda: site.run(site.transfers.free(handle, timeout=PATIENCE))) == "NO_ALLOCATION"
    assert site.allocate(9) != handle


def test_memory_and_channels_are_bounded(site: Session) -> None:
    site.allocate(MAX_MEMORY - 1)
    with pytest.raises(Exhausted, match="DEVICE_MEMORY"):
        site.allocate(2)
    site.allocate(1)
    for _ in range(MAX_CHANNELS):
        site.channel()
    with pytest.raises(Exhausted, match="TRANSFER_CHANNELS"):
        site.channel()
    site.channels[0].close()
    await_rings(site.process.pid, MAX_CHANNELS - 1)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:  # its thread has let go, and is about to end
        with contextlib.suppress(Exhausted):
            site.channel()
            break
    else:
        raise AssertionError("the room of a channel that ended was kept")


def test_allocations_are_counted(site: Session) -> None:
    for _ in range(MAX_ALLOCATIONS):
        site.allocate(1)
    with pytest.raises(Exhausted, match="DEVICE_MEMORY"):
        site.allocate(1)


@pytest.mark.parametrize("size", [MAX_MEMORY + 1, (1 << 64) - 1])
def test_more_memory_than_there_is_costs_the_session_nothing(site: Session, size: int) -> None:
    with pytest.raises(Exhausted, match="DEVICE_MEMORY"):
        site.allocate(size)
    assert site.allocate(1)


def test_channels_end_with_their_session(site: Session) -> None:
    handle, channel = site.allocate(9), site.channel()
    channel.write(handle, 0, b"x")
    site.end()
    assert refusal(lambda: channel.write(handle, 0, b"y")) == "TRANSFER_PEER_GONE"
    assert refusal(lambda: channel.write(handle, 0, b"y")) == "TRANSFER_DEAD"


def test_channels_outlive_an_update_of_the_sessions_keys(site: Session) -> None:
    """They come from its exporter, which stays; and so do those of a channel opened afterwards."""
    handle, channel = site.allocate(9), site.channel()
    site.run(site.transfers._session.update_keys(time.monotonic() + PATIENCE))
    channel.write(handle, 0, b"the first")
    assert content(site.channel(), handle, 9) == b"the first"


def test_a_session_does_not_see_what_another_has(process: GpuProcess, site: Session) -> None:
    handle, channel = site.allocate(9), site.channel()
    channel.write(handle, 0, b"private")
    with session(process) as other:
        assert refusal(lambda: content(other.channel(), handle, 9)) == "NO_ALLOCATION"


def test_a_channel_number_is_good_once(site: Session) -> None:
    """Otherwise keys would come back, and their counters begin anew."""
    site.channel()
    site.transfers._channels = 0
    assert refusal(site.channel) == "GPU_ERROR"


def test_memory_and_channels_are_there_within_a_session_only(process: GpuProcess, site: Session) -> None:
    for name, arguments in (("allocate", {"size": 1}), ("free", {"handle": 1}), ("transfer", {"channel": 9})):
        link = site.transfers._session._link.__class__(process.socket, 1)

        async def ask(link: object = link, name: str = name, arguments: object = arguments) -> bytes:
            request = commands.encode_request(name, **arguments)  # type: ignore[arg-type]
            return await link.vendor(request, time.monotonic() + PATIENCE)  # type: ignore[attr-defined,no-any-return]

        assert commands.parse_answer(site.run(ask())) == "unsupported"
        site._loop.call_soon_threadsafe(link.close)


@pytest.mark.parametrize("descriptors_sent", [0, 1, 3])
def test_strangers_at_the_door(process: GpuProcess, site: Session, descriptors_sent: int) -> None:
    before = rings_of(process.pid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(PATIENCE)
        stranger.connect(str(door_of(process.socket)))
        fds = [make_ring() for _ in range(descriptors_sent)]
        socket.send_fds(stranger, [bytes(16)], fds)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        for fd in fds:
            os.close(fd)
    assert rings_of(process.pid) == before
    site.channel()


@pytest.mark.parametrize("how", ["vanish", "other-device", "other-chain"])
def test_a_device_that_is_gone_ends_its_channels_at_once(how: str) -> None:
    """Nobody sends it a message of SPDM any more. Another device's go on."""
    with running_gpus("--count", "2") as process, session(process) as site, session(process, 1) as other:
        handle, channel = site.allocate(1 << 20), site.channel()
        theirs, neighbour = other.allocate(9), other.channel()
        begun, caught = threading.Event(), list[str]()

        def write() -> None:
            while True:
                channel.write(handle, 0, bytes(1 << 20))
                begun.set()

        writing = threading.Thread(target=lambda: caught.append(refusal(write)))
        writing.start()
        assert begun.wait(PATIENCE)
        site.misbehave(how, 1)
        writing.join()
        assert caught == ["TRANSFER_PEER_GONE"]
        await_rings(process.pid, 1)
        neighbour.write(theirs, 0, b"goes on..")
        site.behave()
        assert refusal(lambda: site.allocate(1)) in ("GPU_ERROR", "GPU_DRIVER")  # it may be back; the session is not


def test_a_killed_device_is_noticed_and_nothing_is_left() -> None:
    """In the middle of a transfer, which is told so; descriptors and mappings are gone with the channel."""
    data, out = bytes(16 << 20), bytearray(16 << 20)
    ways: tuple[Callable[[Channel, int], None], ...] = (
        lambda channel, handle: channel.write(handle, 0, data),
        lambda channel, handle: channel.read_into(handle, 0, out),
    )
    with running_gpus() as process:
        gc.collect()  # what earlier tests left
        before = descriptors(), rings_of(os.getpid())
        for way in ways:
            with session(process) as site:
                handle, channel = site.allocate(16 << 20), site.channel()
                begun, caught = threading.Event(), list[str]()

                def move(
                    way: Callable[[Channel, int], None] = way,
                    channel: Channel = channel,
                    handle: int = handle,
                    begun: threading.Event = begun,
                ) -> None:
                    while True:
                        way(channel, handle)
                        begun.set()

                moving = threading.Thread(target=lambda move=move, caught=caught: caught.append(refusal(move)))  # type: ignore[misc]
                moving.start()
                assert begun.wait(PATIENCE)
                process.kill()
                moving.join()
                assert caught == ["TRANSFER_PEER_GONE"]
                assert rings_of(os.getpid()) == before[1]
            process.start()
            assert (descriptors(), rings_of(os.getpid())) == before


AGENT = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from fixtures.softwaregpu import GpuProcess
from fixtures.transfer import session
with session(GpuProcess(Path(sys.argv[1]))) as site:
    handle, channel = site.allocate(1 << 20), site.channel()
    while True:
        channel.write(handle, 0, bytes(1 << 20))
        print("written", flush=True)
"""


def test_a_killed_agent_is_noticed_and_nothing_is_left(process: GpuProcess) -> None:
    before = descriptors(process.pid), rings_of(process.pid)
    tests = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", AGENT, str(process.socket.parent), tests]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "written\n"
        assert rings_of(process.pid) == before[1] + 1
        agent.kill()
    await_rings(process.pid, before[1])
    until = time.monotonic() + PATIENCE
    while descriptors(process.pid) > before[0]:  # the session's connection ends a moment later than the channel
        assert time.monotonic() < until, "a descriptor was kept"
        time.sleep(0.001)


def test_an_agent_that_dies_is_noticed(process: GpuProcess) -> None:
    with session(process) as site:
        channels = [site.channel() for _ in range(3)]
        assert rings_of(process.pid) == 3
        channels[0].close()
        await_rings(process.pid, 2)
        channels[1].close()
    await_rings(process.pid, 0)


def test_a_device_that_does_not_answer_in_time(site: Session) -> None:
    """The host carries nothing."""
    host = Host()
    handle, channel = site.allocate(9), site.channel(host, stall=0.05)
    assert refusal(lambda: channel.write(handle, 0, b"x")) == "TRANSFER_STALLED"
    host.close()


def test_a_dead_channel_holds_no_memory_of_its_callers(site: Session) -> None:
    """A lease could not be unmapped otherwise."""
    host, memory = Host(), mmap.mmap(-1, 4096)
    handle, channel = site.allocate(9), site.channel(host, stall=0.05)
    assert refusal(lambda: channel.write(handle, 0, memoryview(memory))) == "TRANSFER_STALLED"
    gc.collect()  # what the look at the error itself has left
    memory.close()
    assert channel.dead is not None
    host.close()


def test_closing_a_channel_that_waits(site: Session) -> None:
    host = Host()
    handle, channel = site.allocate(9), site.channel(host)
    caught: list[str] = []
    writing = threading.Thread(target=lambda: caught.append(refusal(lambda: channel.write(handle, 0, b"x"))))
    writing.start()
    time.sleep(0.02)
    channel.close()
    writing.join()
    assert caught[0] in ("TRANSFER_STOPPED", "TRANSFER_DEAD")
    host.close()


def test_the_engine_keeps_channels_apart(site: Session) -> None:
    """One stalls, the others go on; whoever waits for it is told."""
    engine, host = Engine(limit=3), Host()
    handle, stalled = site.allocate(9), site.channel(host)
    others = [site.channel() for _ in range(2)]
    for channel in (stalled, *others):
        engine.add(channel)
    stuck = [engine.submit(stalled, lambda channel: channel.write(handle, 0, b"x")) for _ in range(3)]
    for number, channel in enumerate(others):
        engine.submit(channel, lambda channel, number=number: channel.write(handle, number, b"%d" % number)).result(  # type: ignore[misc]
            PATIENCE
        )
    assert not any(future.done() for future in stuck)
    assert engine.submit(others[0], lambda channel: content(channel, handle, 2)).result(PATIENCE) == b"01"
    with pytest.raises(Exhausted, match="TRANSFER_CHANNELS"):
        engine.add(site.channel())
    assert site.channels[-1].dead is not None
    engine.remove(stalled)
    with pytest.raises(Unavailable, match="TRANSFER_STOPPED"):
        stuck[0].result(PATIENCE)
    assert stuck[2].cancelled()
    with pytest.raises(Unavailable, match="TRANSFER_STOPPED"):
        engine.submit(stalled, lambda channel: None)
    engine.close()
    assert all(channel.dead is not None for channel in others)
    host.close()


def test_a_queue_is_bounded(site: Session) -> None:
    engine, go = Engine(), threading.Event()
    channel = site.channel()
    engine.add(channel)
    futures = [engine.submit(channel, lambda _: go.wait(PATIENCE)) for _ in range(MAX_WAITING)]
    with pytest.raises(Exhausted, match="TRANSFER_QUEUE"):
        engine.submit(channel, lambda _: None)
    go.set()
    assert all(future.result(PATIENCE) for future in futures)
    engine.submit(channel, lambda _: None).result(PATIENCE)
    engine.close()


def test_transfers_by_the_gpus_client(process: GpuProcess) -> None:
    """As the agent would."""
    from cgpu_agent.backends.gpu.software.client import SoftwareGpus

    async def run() -> bytes:
        gpus = SoftwareGpus(process.socket)
        uuid = (await gpus.list(timeout=PATIENCE))[0].uuid
        transfers = await gpus.establish_transfers(uuid, timeout=PATIENCE)
        handle = await transfers.allocate(5, timeout=PATIENCE)
        channel = await transfers.channel(timeout=PATIENCE)
        out = bytearray(5)
        await asyncio.to_thread(channel.write, handle, 0, b"bytes")
        await asyncio.to_thread(channel.read_into, handle, 0, out)
        channel.close()
        await transfers.end(timeout=PATIENCE)
        gpus.close()
        return bytes(out)

    assert asyncio.run(run()) == b"bytes"


def test_a_door_that_is_not_there(process: GpuProcess, site: Session) -> None:
    before = descriptors(), rings_of(os.getpid())
    site.transfers._door = process.socket.with_name("nowhere")
    with pytest.raises(DeviceFault, match="GPU_DRIVER"):
        site.channel()
    assert (descriptors(), rings_of(os.getpid())) == before


def test_moves_of_any_size_over_two_channels_at_a_time(process: GpuProcess) -> None:
    """A short cycle of ``make soak``, which compares all that comes back."""
    rng = random.Random(1)
    assert soak.cycle(process, soak.make_source(rng), rng, 5) > soak.ROOM
    await_rings(process.pid, 0)
