"""Attacks on channels: by other processes, the GPU and the way to it, callers on their own leases, and on trust."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest

from cgpu_agent.domain.channel import GpuChannel
from cgpu_agent.domain.channels import Range
from cgpu_agent.domain.gpustate import Reason
from cgpu_agent.domain.loading import PIECE as LOADED
from cgpu_agent.domain.policy import Policy
from cgpu_agent.domain.transfers import PIECE
from cgpu_agent.errors import AgentError, Denied
from cgpu_agent.wire.sealed import ObjectName
from cgpu_agent.wire.transfer import Direction
from fixtures.channels import LIMITS, LOADS, MIB, Ground, Work, running, sealed, slug
from fixtures.leases import NAME, RULES, until
from fixtures.softwaregpu import GpuProcess, running_gpus
from fixtures.transfer import Edit, Host, descriptors, rings_of

SECRET = b"plaintext that must not come back" * 1000


@pytest.fixture(scope="module")
def gpus() -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as process:
        yield process


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


async def after(ground: Ground, channel: GpuChannel) -> str:
    """What its owner hears from a channel that has ended."""
    return await slug(ground.channels.allocate(ground.me, channel.id, 1))


# -- whose channel it is


def test_to_another_process_there_is_no_such_channel(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(4096)
        handle = await ground.put(channel, work, b"text")
        channels, told = ground.channels, set()
        with ground.lending.caller(other=True) as other:
            for process, name in ((other, channel.id), (ground.me, bytes(16)), (ground.me, b""), (other, b"x")):

                def watch(process: object = process, name: bytes = name) -> Awaitable[object]:
                    return channels.watch(process, name, 0).__anext__()  # type: ignore[arg-type]

                attempts: list[Callable[[], Awaitable[object]]] = [
                    lambda p=process, n=name: channels.allocate(p, n, 1),
                    lambda p=process, n=name: channels.free(p, n, handle),
                    lambda p=process, n=name: channels.synchronize(p, n, 1, 0.1),
                    lambda p=process, n=name: channels.close(p, n),
                    watch,
                    lambda p=process, n=name: ground.loading.load(
                        p.caller, p, n, bytes(16), NAME, 4096, handle, ground.lending.begin
                    ),
                ]
                for attempt in attempts:
                    with pytest.raises(Denied) as raised:
                        await attempt()
                    told.add((raised.value.slug, raised.value.message))
                with pytest.raises(Denied):
                    channels.submit(process, name, [work.range(handle)])
            assert channels.all_of(other) == []
        assert {slug for slug, _ in told} == {"NO_CHANNEL"}
        assert len(told) == 1
        assert channels.all_of(ground.me) == [channel]

    running(gpus, scenario)


def test_a_lease_of_another_process_is_none_for_my_channel(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        work = await ground.lease(4096)
        with ground.lending.caller(other=True) as other:
            channel = await ground.open(other)
            handle = await ground.allocate(channel, 4096, other)
            with pytest.raises(Denied) as raised:
                ground.channels.submit(other, channel.id, [work.range(handle)])
        assert raised.value.slug == "NO_LEASE"

    running(gpus, scenario)


def test_the_death_of_its_process_ends_a_channel_and_gives_all_of_it_back(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        for _ in range(LIMITS.channels_per_uid + 1):
            with contextlib.ExitStack() as stack:
                other = stack.enter_context(ground.lending.caller(other=True))
                channel = await ground.open(other)
                handle = await ground.allocate(channel, LIMITS.device_memory_per_uid, other)
                assert handle
                os.kill(other.caller.pid, 9)
                await until(lambda: not len(ground.channels))
            await ground.ended()
        assert [record.data["reason"] for record in ground.events("channel-ended")] == ["CALLER_GONE"] * 5
        await until(lambda: rings_of(gpus.pid) == 0)

    running(gpus, scenario)


def test_a_caller_that_died_while_its_channel_was_being_opened_has_none(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        with ground.lending.caller(other=True) as other:

            async def die() -> None:
                os.kill(other.caller.pid, 9)
                await until(lambda: not other.alive())

            ground.devices.meanwhile = die
            assert await slug(ground.open(other)) == "CALLER_GONE"
        await ground.ended()
        assert len(ground.channels) == 0

    running(gpus, scenario)


# -- trust


def test_a_doubt_stops_every_channel_before_the_ready_state_is_cleared(gpus: GpuProcess) -> None:
    seen: list[list[bool]] = []

    async def scenario(ground: Ground) -> None:
        channels = [await ground.open(), await ground.open(gpu=1)]
        work = await ground.lease(8 * MIB)  # more than a ring holds
        handles = [await ground.allocate(channel, work.size) for channel in channels]
        inside, set_ready = ground.site.sessions._gpus, ground.site.sessions._gpus.set_ready

        async def watched(ready: bool, *, timeout: float) -> None:
            seen.append([channel.ended is not None and channel._link._duplex.end.stopped for channel in channels])
            await set_ready(ready, timeout=timeout)

        inside.set_ready = watched  # type: ignore[method-assign]
        with ground.stalled():
            busy = ground.submit(channels[0], work.range(handles[0]))
            await until(lambda: busy.progress().state == "running")
            ground.site.sessions.state.doubt(Reason("GPU_XID", "the driver reported an error"))
        await ground.site.sessions.distrust(Reason("GPU_XID", "the driver reported an error"))
        assert seen[0] == [True, True]
        assert await slug(ground.wait(channels[0], busy)) == "TRANSFER_STOPPED"
        for channel, handle in zip(channels, handles, strict=True):
            assert await after(ground, channel) == "TRANSFER_STOPPED"
            assert await slug(lambda c=channel, h=handle: ground.submit(c, work.range(h))) == "TRANSFER_STOPPED"
        await ground.ended()
        assert [record.data["reason"] for record in ground.events("channel-ended")] == ["GPU_XID", "GPU_XID"]
        assert await slug(ground.open()) == "GPU_NOT_TRUSTED"
        await ground.site.tick(40.0)
        again = await ground.open()  # trusted again: a new channel, under keys of its own
        assert await after(ground, channels[0]) == "TRANSFER_STOPPED"
        assert await ground.allocate(again, MIB)

    running(gpus, scenario)


def test_a_driver_that_fails_at_stopping_a_channel_keeps_neither_gpus_nor_other_channels_open(
    gpus: GpuProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(ground: Ground) -> None:
        channels = [await ground.open() for _ in range(2)]

        def broken() -> None:
            monkeypatch.undo()
            raise RuntimeError

        monkeypatch.setattr(channels[0]._link, "stop", broken)
        await ground.site.sessions.distrust(Reason("GPU_XID", "the driver reported an error"))
        assert await ground.site.ready() is False
        for channel in channels:
            assert await after(ground, channel) == "TRANSFER_STOPPED"
        await ground.ended()
        assert len(ground.events("channel-ended")) == 2

    running(gpus, scenario)


def test_a_verdict_that_is_renewed_changes_nothing(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(4096)
        before = ground.site.sessions.trusted(ground.uuids[0]).until
        await ground.site.wait(570.0)
        assert ground.site.sessions.trusted(ground.uuids[0]).until > before
        assert await ground.put(channel, work, b"text")

    running(gpus, scenario)


def test_no_channel_is_opened_to_a_gpu_that_is_doubted_meanwhile(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        async def doubt() -> None:
            await ground.site.sessions.distrust(Reason("GPU_XID", "the driver reported an error"))

        ground.devices.meanwhile = doubt
        assert await slug(ground.open()) == "TRUST_CHANGED"
        ground.devices.meanwhile = None
        await ground.site.tick(40.0)
        record = ground.lending.audit.record

        async def recorded(event: str, data: object) -> int:
            found = await record(event, data)  # type: ignore[arg-type]
            if event == "channel":
                await doubt()
            return found

        ground.lending.audit.record = recorded  # type: ignore[method-assign]
        assert await slug(ground.open()) == "TRUST_CHANGED"
        await ground.ended()
        assert len(ground.channels) == 0
        await until(lambda: rings_of(gpus.pid) == 0)

    running(gpus, scenario)


def test_no_channel_is_opened_before_the_ready_state_is_set(gpus: GpuProcess) -> None:
    told: list[str] = []

    async def scenario(ground: Ground) -> None:
        inside, set_ready = ground.site.sessions._gpus, ground.site.sessions._gpus.set_ready

        async def watched(ready: bool, *, timeout: float) -> None:
            told.append(await slug(ground.open()))
            await set_ready(ready, timeout=timeout)

        inside.set_ready = watched  # type: ignore[method-assign]
        await ground.site.sessions.distrust(Reason("GPU_XID", "the driver reported an error"))
        await ground.site.tick(40.0)
        assert await ground.open()
        assert told == ["GPU_NOT_TRUSTED"] * 2  # when it was cleared, and before it was set

    running(gpus, scenario)


def test_no_channel_is_opened_to_a_gpu_whose_verdict_has_ended_or_that_nobody_knows(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        assert await slug(ground.channels.open(ground.me, "GPU-of-another-machine")) == "UNKNOWN_GPU"
        ground.site.clock.pass_by(601.0)  # and nobody has looked yet
        assert await slug(ground.open()) == "GPU_NOT_TRUSTED"

    running(gpus, scenario)


def test_another_gpu_in_the_place_of_the_one_that_was_attested_gets_nothing(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        ground.devices.instead = ground.uuids[1]
        assert await slug(ground.open()) == "GPU_IDENTITY_CHANGED"
        assert len(ground.channels) == 0
        assert (ground.site.reason, await ground.site.ready()) == ("GPU_IDENTITY_CHANGED", False)
        assert ground.events("channel") == []

    running(gpus, scenario)


def test_a_machine_that_was_copied_sends_nothing_under_the_keys_of_its_twin(gpus: GpuProcess) -> None:
    """Attack 31: both would seal other bytes under one key and one counter."""

    async def scenario(ground: Ground) -> None:
        ground.generation = 7
        channel, work = await ground.open(), await ground.lease(3 * PIECE)
        handle = await ground.allocate(channel, work.size)
        with ground.stalled():
            busy, queued = (ground.submit(channel, work.range(handle)) for _ in range(2))
            await until(lambda: busy.progress().state == "running")
            ground.generation = 8
        assert await slug(ground.wait(channel, busy)) == "TRANSFER_STOPPED"
        assert busy.done <= PIECE  # the piece that was under way
        assert await slug(ground.wait(channel, queued)) == "TRANSFER_STOPPED"
        assert queued.done == 0
        assert await after(ground, channel) == "TRANSFER_STOPPED"
        await ground.ended()
        (ended,) = ground.events("channel-ended")
        assert ended.data["reason"] == "TRANSFER_STOPPED"
        assert await ground.open()

    running(gpus, scenario)


# -- the way to the GPU


def flipped(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
    yield data[:-1] + bytes([data[-1] ^ 1])


def doubled(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
    yield from (data, data)


def replayed(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
    yield host.history[direction, 0]


@pytest.mark.parametrize("edit", [flipped, replayed, doubled])
def test_a_slot_that_is_not_genuine_ends_its_channel_loudly_and_no_other(
    gpus: GpuProcess, host: Host, edit: Edit
) -> None:
    async def scenario(ground: Ground) -> None:
        other, work = await ground.open(), await ground.lease(4 * MIB)
        ground.devices.host = host
        channel = await ground.open()
        host.work((Direction.TO_HOST, 3), edit)
        handle = await ground.put(channel, work, bytes(4 * MIB))
        transfers = [ground.submit(channel, work.range(handle, to_device=False)) for _ in range(2)]
        told = await slug(ground.wait(channel, transfers[0]))
        assert host.meddled
        assert told in {"SLOT_ALTERED", "SLOT_ORDER", "BAD_TRANSFER"}
        assert await after(ground, channel) == told
        assert await slug(ground.wait(channel, transfers[1])) == told
        await ground.ended()
        (ended,) = ground.events("channel-ended")
        assert (ended.data["reason"], ended.data["errors"]) == (told, 2)
        assert await ground.put(other, work, SECRET)
        memory = ground.lending.leases.work(work.id, ground.me)
        work.taken.close()
        await ground.lending.idle()
        assert memory._map.closed  # what the channel died of does not keep it
        host.rest()

    running(gpus, scenario)


def test_a_gpu_that_hangs_up_ends_the_channel(gpus: GpuProcess, host: Host) -> None:
    """What the device refuses it does not explain: it hangs up."""

    async def scenario(ground: Ground) -> None:
        ground.devices.host = host
        channel, work = await ground.open(), await ground.lease(MIB)
        host.work((Direction.TO_DEVICE, 2), flipped)
        handle = await ground.allocate(channel, MIB)
        assert await slug(ground.copy(channel, work.range(handle))) == "TRANSFER_PEER_GONE"
        assert await after(ground, channel) == "TRANSFER_PEER_GONE"
        host.rest()

    running(gpus, scenario)


def test_a_gpu_that_does_not_answer_what_is_asked_beside_ends_the_channel(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel = await ground.open()
        ground.devices.made[-1]._session._link.close()
        assert await after(ground, channel) in ("GPU_ERROR", "GPU_DRIVER")
        ended = await after(ground, channel)
        assert ended in ("GPU_ERROR", "GPU_DRIVER")
        await ground.ended()
        assert [record.data["reason"] for record in ground.events("channel-ended")] == [ended]

    running(gpus, scenario)


# -- leases


def test_a_lease_that_ends_in_the_middle_of_a_transfer_stops_it_and_harms_nobody(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work, kept = await ground.open(), await ground.lease(3 * PIECE), await ground.lease(4096)
        handle = await ground.allocate(channel, work.size)
        work.view[:] = bytes([7]) * work.size
        memory = os.dup(work.taken.memory)
        with ground.stalled():
            busy, queued = (ground.submit(channel, work.range(handle, to_device=way)) for way in (True, False))
            await until(lambda: busy.progress().state == "running")
            work.taken.close()
            await until(lambda: len(ground.lending.leases) == 1)
        for transfer in (busy, queued):
            assert await slug(ground.wait(channel, transfer)) == "LEASE_GONE"
        await until(lambda: ground.lending.connections == 1)
        assert os.fstat(memory).st_blocks == 0  # nothing was written there afterwards
        assert busy.done <= PIECE
        await ground.copy(channel, kept.range(handle))  # the channel lives
        os.close(memory)

    running(gpus, scenario)


def test_no_two_callers_ever_have_the_same_memory(gpus: GpuProcess) -> None:
    """Attack 18: who keeps descriptor and mapping of a lease that ended sees nothing of those that come after."""

    async def scenario(ground: Ground) -> None:
        mine = await ground.lease(MIB)
        mine.view[:4] = b"mine"
        inode = os.fstat(mine.taken.memory).st_ino
        mine.taken.close(keep=True)
        await ground.lending.idle()
        assert mine.view[:] == bytes(MIB)
        others = await ground.lease(MIB)
        assert os.fstat(others.taken.memory).st_ino != inode
        assert others.view[:] == bytes(MIB)
        others.view[:4] = b"text"
        mine.view[:4] = b"mine"
        assert others.view[:4] == b"text"
        assert mine.view[:4] == b"mine"
        os.close(mine.taken.memory)

    running(gpus, scenario)


def test_device_memory_is_zeros_for_whoever_gets_it(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        work = await ground.lease(len(SECRET))
        for _ in range(3):
            channel = await ground.open()
            for _ in range(2):
                handle = await ground.allocate(channel, len(SECRET))
                await ground.copy(channel, work.range(handle, to_device=False))
                assert work.view[:] == bytes(len(SECRET))
                await ground.channels.free(ground.me, channel.id, handle)
                await ground.put(channel, work, SECRET)
            await ground.channels.close(ground.me, channel.id)

    running(gpus, scenario)


def test_who_writes_to_his_lease_while_it_is_sealed_harms_himself_only(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(8 * MIB)
        handle = await ground.allocate(channel, work.size)
        over = threading.Event()

        def scribble() -> None:
            byte = 0
            while not over.is_set():
                byte = (byte + 1) % 256
                work.view[: 1 << 16] = bytes([byte]) * (1 << 16)
                work.view.madvise(mmap.MADV_REMOVE, 0, 1 << 16)

        scribbling = threading.Thread(target=scribble)
        scribbling.start()
        for _ in range(5):
            assert (await ground.copy(channel, work.range(handle))).state == "done"
        over.set()
        scribbling.join()
        assert channel.ended is None

    running(gpus, scenario)


# -- sealed objects, attack 30: neither key nor plaintext come to the caller


def reading(work: Work, handle: int) -> Range:
    return Range(False, work.id, 0, handle, 0, 1)


def test_what_was_loaded_is_not_read_back(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(3 * PIECE)
        plain = SECRET * (2 * LOADED // len(SECRET))
        handle = await ground.allocate(channel, 3 * PIECE)
        with ground.stalled():
            early = ground.submit(channel, work.range(handle), work.range(handle, to_device=False))
            loading = asyncio.create_task(ground.load(channel, sealed(plain), handle))
            loaded = await loading
            assert await slug(lambda: ground.submit(channel, reading(work, handle))) == "DEVICE_SEALED"
        await ground.wait(channel, loaded)
        assert await slug(lambda: ground.submit(channel, reading(work, handle))) == "DEVICE_SEALED"
        assert await slug(ground.wait(channel, early)) == "DEVICE_SEALED"
        assert SECRET[:33] not in work.view[:]
        assert await asyncio.to_thread(ground.peek, channel, handle, 33) == SECRET[:33]
        await ground.channels.free(ground.me, channel.id, handle)
        again = await ground.allocate(channel, 3 * PIECE)
        await ground.copy(channel, work.range(again, to_device=False))
        assert work.view[:] == bytes(3 * PIECE)

    running(gpus, scenario)


def test_what_is_not_the_object_is_wiped_from_the_device(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, plain = await ground.open(), SECRET * (3 * LOADED // len(SECRET))
        whole = sealed(plain)
        altered = bytearray(whole)
        altered[len(whole) * 5 // 6] ^= 1  # what comes before it has reached the device by then
        handle = await ground.allocate(channel, len(plain))
        transfer = await ground.load(channel, bytes(altered), handle)
        assert await slug(ground.wait(channel, transfer)) == "NOT_AUTHENTIC"
        assert transfer.done >= LOADED
        assert await asyncio.to_thread(ground.peek, channel, handle, len(plain)) == bytes(len(plain))
        for bad in (ObjectName(NAME.key_id, NAME.object_id, 6), ObjectName(NAME.key_id, "models/other", 7)):
            assert await slug(ground.load(channel, whole, handle, name=bad)) == "NOT_AUTHENTIC"
        assert await slug(ground.load(channel, whole[:-1], handle)) == "NOT_AUTHENTIC"
        assert channel.ended is None

    running(gpus, scenario)


def test_a_doubt_or_another_policy_ends_loading_and_nothing_stays(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        plain = SECRET * (3 * LOADED // len(SECRET))
        channel = await ground.open()
        handle = await ground.allocate(channel, len(plain))
        with ground.stalled():
            transfer = await ground.load(channel, sealed(plain), handle)
            ground.lending.policy = Policy.load(RULES, "test")
        assert await slug(ground.wait(channel, transfer)) == "NOT_ALLOWED"
        assert await asyncio.to_thread(ground.peek, channel, handle, len(plain)) == bytes(len(plain))
        ground.lending.policy = Policy.load(LOADS, "test")
        with ground.stalled():
            transfer = await ground.load(channel, sealed(plain), handle)
            ground.site.sessions.state.doubt(Reason("GPU_XID", "the driver reported an error"))
        assert await slug(ground.wait(channel, transfer)) == "TRANSFER_STOPPED"
        await ground.ended()
        await ground.lending.idle()

    running(gpus, scenario)


def test_one_way_to_use_a_key_gives_no_right_to_another(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel = await ground.open()
        handle = await ground.allocate(channel, 100)
        ground.lending.policy = Policy.load(RULES, "test")  # key.open for every key
        assert await slug(ground.load(channel, sealed(bytes(9)), handle)) == "NOT_ALLOWED"
        gpu = f'context.gpu.uuid == "{ground.uuids[1]}"'
        load = LOADS.removeprefix(RULES).replace("CGpu::Key);", f"CGpu::Key) when {{ {gpu} }};")
        ground.lending.policy = Policy.load(RULES + load, "test")
        assert await slug(ground.load(channel, sealed(bytes(9)), handle)) == "NOT_ALLOWED"
        assert ground.events("key") == []
        right = await ground.open(gpu=1)
        handle = await ground.allocate(right, 100)
        await ground.wait(right, await ground.load(right, sealed(bytes(9)), handle))

    running(gpus, scenario)


def test_nothing_is_left_of_what_ended(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        async def once(number: int) -> None:
            channel, work = await ground.open(), await ground.lease(MIB)
            handle = await ground.put(channel, work, SECRET)
            await ground.wait(channel, await ground.load(channel, sealed(SECRET), handle))
            if number % 2:
                await ground.channels.close(ground.me, channel.id)
            else:
                ground.channels._faulted(channel, AgentError("SLOT_ALTERED", "for a test"))
                await ground.ended()
                await ground.channels.close(ground.me, channel.id)
            work.view.close()
            work.taken.close()
            await ground.lending.idle()

        for number in range(2):
            await once(number)
        before = descriptors()
        for number in range(6):
            await once(number)
        assert descriptors() == before
        assert not ground.channels._table
        assert not ground.channels._records
        for budget in (ground.channels._open, ground.channels._queued, ground.channels._memory):
            assert not budget._taken
        await until(lambda: rings_of(gpus.pid) == 0)

    running(gpus, scenario)
