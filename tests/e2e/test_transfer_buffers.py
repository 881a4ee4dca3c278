"""A real daemon, software GPUs in a process of their own, and workloads that transfer, are killed, and come back."""

from __future__ import annotations

import array
import asyncio
import ctypes
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cgpu_agent.client import Agent, AgentError, calls
from cgpu_agent.client.calls import Copy, Progress
from cgpu_agent.client.channels import Channel
from cgpu_agent.client.lease import LeasedMemory
from cgpu_agent.client.transfer import HALF
from cgpu_agent.errors import Denied, Misuse, Unavailable
from cgpu_agent.objects.stream import Sealer
from cgpu_agent.wire.sealed import ObjectName
from fixtures.daemon import PATIENCE, booted_daemon
from fixtures.gpudaemon import GpuDaemon, gpu_daemon
from fixtures.policies import permit
from fixtures.transfer import rings_of

pytestmark = pytest.mark.swtpm

ME = f"principal.uid == {os.geteuid()}"
TRANSFER = permit("gpu.transfer", ME)
LOAD = permit("key.load", f'{ME} && resource == CGpu::Key::"models/llama" && context.gpus == "ready"')
KEYS = '[[key]]\nid = "models/llama"\nbroker = "credential"\npath = "llama.key"\n'
KEY = os.urandom(32)
PLAIN = os.urandom(1 << 20) + b"the weights" * 500_000
NAME = ObjectName("models/llama", "llama-70b", 3)

# Puts without end, once it has said that it began.
_WORKLOAD = """
import os, sys
from cgpu_agent.client import Agent
data = os.urandom(64 << 20)
with Agent(sys.argv[1]) as agent, agent.channel() as channel:
    handle = channel.put(data)
    print("transferring", flush=True)
    while True:
        channel.put(data, handle=handle)
"""
# Puts and gets data of its own, by way of the agent's memory and without, and says whether all of it was right.
_CHECKER = """
import os, sys
from cgpu_agent.client import Agent
right = True
with Agent(sys.argv[1]) as agent, agent.channel() as channel:
    buffer = channel.buffer(1 << 20)
    for size in (1, 4096, 1 << 20, (1 << 20) + 1, (16 << 20) + 7):
        data, out = os.urandom(size), bytearray(size)
        handle = channel.put(data)
        channel.get(handle, out)
        right &= out == data
        if size <= 1 << 20:
            channel.get(handle, buffer.view[:size])
            right &= bytes(buffer.view[:size]) == data
        channel.free(handle)
print(right)
"""
# Tries what the ids of another process's channel and lease are good for.
_THIEF = """
import json, sys
from cgpu_agent.client import Agent, AgentError, calls
from cgpu_agent.client.calls import Copy
socket, channel, lease, handle = sys.argv[1], bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3]), int(sys.argv[4])
copies = [Copy(True, lease, 0, handle, 0, 1)]
told = []
with Agent(socket) as agent, agent.channel() as mine:
    for call in (calls.submit(channel, copies), calls.submit(mine.id, [Copy(True, lease, 0, mine.allocate(1), 0, 1)]),
                 calls.allocate(channel, 1), calls.free(channel, handle), calls.synchronize(channel, 1, 1),
                 calls.close_channel(channel), calls.get_transfer_stats(channel)):
        try:
            told.append(repr(agent._run(call)))
        except AgentError as error:
            told.append(error.slug)
print(json.dumps(told))
"""


@pytest.fixture
def world() -> Iterator[GpuDaemon]:
    with gpu_daemon() as made:
        yield made


@pytest.fixture
def loading(world: GpuDaemon) -> Path:
    """The path of a sealed object that this world can load."""
    credentials = world.daemon.folder / "credentials"
    credentials.mkdir(mode=0o700)
    (credentials / "llama.key").write_bytes(KEY)
    world.daemon.environment["CREDENTIALS_DIRECTORY"] = str(credentials)
    world.keys = KEYS
    sink = io.BytesIO()
    sealer = Sealer(sink, KEY, NAME, 1 << 20)
    sealer.write(PLAIN)
    sealer.finish()
    path = world.daemon.folder / "llama.sealed"
    path.write_bytes(sink.getvalue())
    return path


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def reopened(world: GpuDaemon, agent: Agent) -> Iterator[Channel]:
    """A channel to GPUs that were started anew, once the agent has noticed that and attested them."""
    end = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        while True:
            world.ready()
            try:
                channel = stack.enter_context(agent.channel())
                break
            except Unavailable:
                assert time.monotonic() < end
                time.sleep(0.1)
        yield channel


def workload(world: GpuDaemon) -> subprocess.Popen[str]:
    """One that is transferring."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKLOAD, world.daemon.socket], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "transferring\n"
    return process


def slug_of_puts(channel: Channel, data: bytes, kill: Callable[[], None]) -> str:
    """The reason with which transfers that go on and on end, when something is killed in the middle of them."""
    handle = channel.put(data)
    killing = threading.Timer(0.2, kill)
    killing.start()
    try:
        while True:
            channel.put(data, handle=handle)
    except AgentError as error:
        return error.slug
    finally:
        killing.join()


def test_the_sdk_puts_and_gets_in_two_lines(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    told: list[Progress] = []
    data = os.urandom(3 * HALF + 12345)
    with world.daemon.client() as agent, agent.channel(gpu=1) as channel:
        handle = channel.put(data, progress=told.append)
        out = bytearray(len(data))
        channel.get(handle, out)
        assert out == data
        assert [each.done for each in told] == [HALF, 2 * HALF, 3 * HALF, len(data)]
        assert (told[-1].total, told[-1].ended) == (len(data), True)
        channel.put(b"in the middle", handle=handle, offset=HALF)
        channel.get(handle, part := bytearray(20), offset=HALF - 3)
        assert part == data[HALF - 3 : HALF] + b"in the middle" + data[HALF + 13 : HALF + 17]
        assert channel.stats().bytes_to_device == len(data) + 13
        assert world.daemon.shows("; 1 channels, ")
        assert channel.stats().gpu == agent.list_gpus().gpus[1].uuid
        channel.free(handle)
        with pytest.raises(Misuse) as gone:
            channel.get(handle, part)
        assert gone.value.slug == "NO_ALLOCATION"
        with pytest.raises(Misuse) as unknown, agent.channel(gpu=2):
            pass
        assert unknown.value.slug == "UNKNOWN_GPU"
    assert world.daemon.stop() == 0


def test_everything_that_is_a_buffer_can_be_put_and_what_is_none_is_said_to_be(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    numbers = array.array("d", range(1000))
    words = (ctypes.c_uint32 * 77)(*range(77))
    table = memoryview(bytearray(range(240))).cast("B", (12, 20))
    with world.daemon.client() as agent, agent.channel() as channel:
        for source, out in (
            (numbers, array.array("d", bytes(8000))),
            (words, (ctypes.c_uint32 * 77)()),
            (table, memoryview(bytearray(240)).cast("B", (12, 20))),
        ):
            channel.get(channel.put(source), out)
            assert bytes(out) == bytes(source)
        for bad in (b"", "text", 7, memoryview(bytes(10))[::2]):
            with pytest.raises(Misuse) as refused:
                channel.put(bad)
            assert refused.value.slug == "BAD_BUFFER"
        with pytest.raises(Misuse):
            channel.get(1, bytes(10))
    assert world.daemon.stop() == 0


def test_what_failed_halfway_does_not_come_back_in_later_transfers(world: GpuDaemon) -> None:
    """The agent may still be at one half of the staging when the other is refused: none of it is used again."""
    world.start(TRANSFER)
    data = os.urandom(2 * HALF)
    with world.daemon.client() as agent, agent.channel() as channel:
        short = channel.allocate(HALF + 1)
        for _ in range(3):
            out = bytearray(len(data))
            with pytest.raises(Misuse) as refused:
                channel.get(short, out)
            assert refused.value.slug == "DEVICE_RANGE"
            assert channel._plans._staging == []
            channel.get(channel.put(data), out)
            assert out == data
    assert world.daemon.stop() == 0


def test_what_lies_in_a_buffer_of_the_channel_is_not_copied(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    with world.daemon.client() as agent, agent.channel() as channel:
        buffer = channel.buffer(1 << 20)
        numbers = buffer.view[4096 : 4096 + 8000].cast("d")
        for place in range(1000):
            numbers[place] = place / 3
        before = bytes(numbers)
        handle = channel.put(numbers)
        for place in range(1000):
            numbers[place] = 0
        channel.get(handle, numbers)
        assert bytes(numbers) == before
        assert channel._plans._staging == []
        ticket = channel.submit(
            [Copy(True, buffer.id, 4096, handle, 0, 8000), Copy(False, buffer.id, 0, handle, 8, 16)]
        )
        assert [view[-1].ticket for view in channel.watch(ticket)][-1] == ticket
        assert channel.synchronize(ticket).done == 8016
        assert bytes(buffer.view[:16]) == before[8:24]
        numbers.release()
        ticket = channel.submit([Copy(True, buffer.id, 0, channel.allocate(1 << 20), 0, 1 << 20)] * 100)
        buffer.close()
        with pytest.raises(Unavailable) as ended:
            channel.synchronize(ticket)
        assert ended.value.slug == "LEASE_GONE"
        channel.put(b"and the channel lives")
    assert world.daemon.stop() == 0


def test_the_asyncio_client_does_the_same(world: GpuDaemon, loading: Path) -> None:
    world.start(TRANSFER, LOAD)
    data, told = os.urandom(2 * HALF + 7), list[Progress]()

    async def scenario() -> None:
        async with world.daemon.async_client() as agent, agent.channel() as channel:
            out = bytearray(len(data))
            handle = await channel.put(data, progress=told.append)
            await channel.get(handle, out)
            assert out == data
            buffer = await channel.buffer(4096)
            ticket = await channel.submit([Copy(False, buffer.id, 0, handle, 0, 4096)])
            views = [view async for view in channel.watch(ticket)]
            assert views == [] or views[-1][0].ended
            await channel.synchronize(ticket)
            assert bytes(buffer.view) == data[:4096]
            with loading.open("rb") as file:
                await channel.load_sealed(file, key="models/llama", object_id="llama-70b", version=3)
            assert (await channel.stats()).transfers == 8
            with pytest.raises(Misuse):
                await channel.free(99)

    asyncio.run(scenario())
    assert told[-1].ended
    assert world.daemon.stop() == 0


def test_a_sealed_object_reaches_the_gpu_and_nobody_else(world: GpuDaemon, loading: Path) -> None:
    world.start(TRANSFER, LOAD)
    told: list[Progress] = []
    with world.daemon.client() as agent, agent.channel() as channel, loading.open("rb") as file:
        handle = channel.load_sealed(file, key="models/llama", object_id="llama-70b", version=3, progress=told.append)
        assert (told[-1].done, told[-1].ended) == (len(PLAIN), True)
        with pytest.raises(Denied) as raised:
            channel.get(handle, bytearray(16))
        assert raised.value.slug == "DEVICE_SEALED"
        with pytest.raises(Misuse) as other:
            channel.load_sealed(file, key="models/llama", object_id="llama-8b", version=3)
        assert other.value.slug == "NOT_AUTHENTIC"
        with (
            pytest.raises(Denied) as opened,
            agent.open_sealed("models/llama", file, object_id="llama-70b", version=3),
        ):
            pass
        assert opened.value.slug == "NOT_ALLOWED"
        assert channel.stats().allocations == 1
        (listed,) = agent.list_keys()
        assert (listed.key, listed.opens, list(listed.loads)) == (
            "models/llama",
            False,
            [gpu.uuid for gpu in agent.list_gpus().gpus],
        )
    assert world.daemon.stop() == 0
    (key, _) = world.records("key")
    assert (key.data["how"], key.data["object"], key.data["policies"]) == ("load", "llama-70b", ["key.load"])
    (opening,) = world.records("channel")
    (ending,) = world.records("channel-ended")
    assert (ending.data["of"], ending.data["reason"]) == (opening.sequence, "CLOSED")
    kept = [path for path in world.daemon.folder.rglob("*") if path.is_file() and path.parent.name != "credentials"]
    for text in ("".join(world.daemon.journal).encode(), *(path.read_bytes() for path in kept)):
        assert KEY not in text
        assert PLAIN[:32] not in text


def test_each_lease_takes_its_own_permit(world: GpuDaemon, loading: Path) -> None:
    """And none opens a channel."""

    def refused(kind: bool) -> str | None:
        with loading.open("rb") as file:
            try:
                LeasedMemory(world.daemon.lease_socket, 4096, file if kind else None, PATIENCE).close()
            except AgentError as error:
                return error.slug
        return None

    world.start(permit("key.open", ME))
    with world.daemon.client() as agent:
        assert (refused(True), refused(False)) == (None, "NOT_ALLOWED")
        with pytest.raises(Denied) as raised, agent.channel():
            pass
        assert raised.value.slug == "NOT_ALLOWED"
        world.configure(TRANSFER)
        world.daemon.reload()
        assert (refused(True), refused(False)) == ("NOT_ALLOWED", None)
        world.ready()
        with agent.channel() as channel, loading.open("rb") as file, pytest.raises(Denied) as load:
            channel.load_sealed(file, key="models/llama", object_id="llama-70b", version=3)
        assert load.value.slug == "NOT_ALLOWED"
        world.configure()
        world.daemon.reload()
        assert (refused(True), refused(False)) == ("NOT_ALLOWED", "NOT_ALLOWED")
    assert world.daemon.stop() == 0
    assert world.records("key") == []


def test_a_policy_that_is_withdrawn_ends_the_channel(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    with world.daemon.client() as agent, agent.channel() as channel:
        handle = channel.put(b"text")
        world.configure(TRANSFER, permit("boot.measure", ME))
        world.daemon.reload()
        with pytest.raises(Unavailable) as ended:
            channel.put(b"text", handle=handle)
        assert ended.value.slug == "TRANSFER_STOPPED"
        assert channel.stats().reason == "TRANSFER_STOPPED"
        world.ready()
        with agent.channel() as again:
            again.put(b"text")
            world.configure()
            world.daemon.reload()
            with pytest.raises(Denied) as denied:
                again.put(b"text")
            assert denied.value.slug == "NOT_ALLOWED"
    assert world.daemon.stop() == 0
    assert [each.data["reason"] for each in world.records("channel-ended")] == ["POLICY_CHANGED"] * 2


def test_another_process_of_the_same_uid_can_do_nothing_with_ids_that_it_was_told(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    with world.daemon.client() as agent, agent.channel() as channel:
        buffer, handle = channel.buffer(4096), channel.put(b"mine")
        command = [sys.executable, "-c", _THIEF, world.daemon.socket]
        found = subprocess.run(
            [*command, channel.id.hex(), buffer.id.hex(), str(handle)], capture_output=True, text=True, check=True
        )
        assert json.loads(found.stdout) == ["NO_CHANNEL", "NO_LEASE", *["NO_CHANNEL"] * 5]
        out = bytearray(4)
        channel.get(handle, out)
        assert out == b"mine"
    assert world.daemon.stop() == 0


def test_workloads_at_the_same_time_get_their_own(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    command = [sys.executable, "-c", _CHECKER, world.daemon.socket]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=2 * PATIENCE)[0] for process in running] == ["True\n"] * 4
    assert world.daemon.stop() == 0
    assert [each.data["reason"] for each in world.records("channel-ended")] == ["CLOSED"] * 4


def test_a_workload_that_is_killed_leaves_nothing_behind(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    workload(world).kill()  # what is made once for all
    until(lambda: len(world.records("channel-ended")) == 1)
    world.settles_at({"rings": 0, "leases": 0})
    before = world.held()
    for number in range(2, 5):
        process = workload(world)
        process.kill()
        process.wait()
        until(lambda n=number: len(world.records("channel-ended")) == n)
        until(lambda: rings_of(world.gpus.pid) == 0)
        world.settles_at(before)
    assert {each.data["reason"] for each in world.records("channel-ended")} == {"CALLER_GONE"}
    with world.daemon.client() as agent, agent.channel() as channel:
        assert channel.put(bytes(1 << 20))
    assert world.daemon.stop() == 0


def test_a_gpu_process_that_is_killed_is_told_clearly_and_the_next_run_is_clean(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    data = os.urandom(32 << 20)
    with world.daemon.client() as agent:
        with agent.channel() as channel:
            assert slug_of_puts(channel, data, world.gpus.kill) in {"TRANSFER_PEER_GONE", "TRANSFER_STOPPED"}
        with pytest.raises(AgentError) as refused, agent.channel(0):
            pass
        assert refused.value.slug in {"GPU_NOT_TRUSTED", "GPU_DRIVER", "TRUST_CHANGED"}, refused.value
        world.settles_at({"rings": 0, "leases": 0})
        world.gpus.start()
        with reopened(world, agent) as again:
            out = bytearray(len(data))
            again.get(again.put(data), out)
            assert out == data
    assert world.daemon.stop() == 0


def test_nothing_of_a_channel_survives_the_agent(world: GpuDaemon) -> None:
    """Attack 13: not the channel, not its memory; the GPU lets go of its end."""
    world.start(TRANSFER)
    data = os.urandom(32 << 20)
    with world.daemon.client() as agent, agent.channel() as channel:
        assert slug_of_puts(channel, data, world.daemon.kill) in {"CONNECTION_LOST", "NO_AGENT", "NO_SOCKET"}
        until(lambda: rings_of(world.gpus.pid) == 0)
        world.daemon.start()
        world.ready()
        for call in (calls.allocate(channel.id, 1), calls.get_transfer_stats(channel.id)):
            with pytest.raises(Denied) as lost:
                agent._run(call)
            assert lost.value.slug == "NO_CHANNEL"
        assert agent._run(calls.get_transfer_stats(b"")) == []
    with Agent(world.daemon.socket) as fresh, fresh.channel() as channel:
        out = bytearray(len(data))
        channel.get(channel.allocate(len(data)), out)
        assert out == bytes(len(data))
    assert world.daemon.stop() == 0


def test_an_agent_without_gpus_says_so() -> None:
    with booted_daemon() as daemon:
        daemon.grants = TRANSFER
        daemon.start()
        with daemon.client() as agent:
            for call in (calls.open_channel("GPU-a"), calls.get_transfer_stats(b"")):
                with pytest.raises(Unavailable) as raised:
                    agent._run(call)
                assert raised.value.slug == "NO_GPUS"
        with pytest.raises(Denied):
            LeasedMemory(daemon.lease_socket, 4096, None, PATIENCE)
        assert daemon.stop() == 0


def test_an_agent_that_stops_ends_its_channels_in_order(world: GpuDaemon) -> None:
    world.start(TRANSFER)
    process = workload(world)
    assert world.daemon.stop() == 0
    until(lambda: rings_of(world.gpus.pid) == 0)
    assert [each.data["reason"] for each in world.records("channel-ended")] == ["AGENT_STOPPED"]
    process.kill()
    process.wait()
