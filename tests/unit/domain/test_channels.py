"""Channels: what is put is got, each range is checked before anything moves, and every limit holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest

from cgpu_agent.domain.channel import _QUEUED
from cgpu_agent.domain.channels import MAX_COPIES, ChannelLimits, Range
from cgpu_agent.domain.cores import Cores
from cgpu_agent.domain.transfers import PIECE
from cgpu_agent.errors import AgentError
from fixtures.channels import LIMITS, MIB, Ground, running, sealed, slug
from fixtures.gpusessions import MovableClock
from fixtures.leases import NAME, until
from fixtures.softwaregpu import GpuProcess, running_gpus


@pytest.fixture(scope="module")
def gpus() -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as process:
        yield process


def test_what_is_put_is_got_in_any_size(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(20 * MIB)
        for size in (1, 4095, 256 << 10, (256 << 10) + 1, PIECE, PIECE + 3):
            data = os.urandom(size)
            handle = await ground.put(channel, work, data)
            work.view[:size] = bytes(size)
            found = await ground.copy(channel, work.range(handle, to_device=False, size=size))
            assert work.view[:size] == data
            assert (found.state, found.done, found.total, found.error) == ("done", size, size, None)
            await ground.channels.free(ground.me, channel.id, handle)
        assert channel.tally.to_device == channel.tally.from_device > 2 * PIECE
        assert (channel.tally.transfers, channel.tally.errors) == (12, 0)
        assert channel.tally.busy > 0

    running(gpus, scenario)


def test_many_copies_of_one_transfer_are_made_in_their_order(gpus: GpuProcess) -> None:
    """Small and large ones, to the device and back, over and under each other: as if one after the other."""

    async def scenario(ground: Ground) -> None:
        rng, size = random.Random(4), MIB
        channel, work = await ground.open(), await ground.lease(size)
        handle = await ground.allocate(channel, size)
        lease, device = bytearray(os.urandom(size)), bytearray(size)
        work.view[:] = bytes(lease)
        ranges = []
        for _ in range(600):
            length = rng.choice([1, 7, 4096, 64 << 10, (64 << 10) + 1])
            start, offset, to_device = rng.randrange(size - length), rng.randrange(size - length), rng.random() < 0.9
            ranges.append(Range(to_device, work.id, start, handle, offset, length))
            if to_device:
                device[offset : offset + length] = lease[start : start + length]
            else:
                lease[start : start + length] = device[offset : offset + length]
        found = await ground.copy(channel, *ranges)
        assert found.done == found.total == sum(each.size for each in ranges)
        assert work.view[:] == bytes(lease)
        assert await asyncio.to_thread(ground.peek, channel, handle, size) == bytes(device)

    running(gpus, scenario)


def test_a_small_transfer_does_not_wait_for_the_many_of_another_channel(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        busy, other, work = await ground.open(), await ground.open(), await ground.lease(8 * MIB)
        handles = [await ground.allocate(channel, work.size) for channel in (busy, other)]
        many = [ground.submit(busy, work.range(handles[0])) for _ in range(12)]
        await ground.copy(other, work.range(handles[1], size=64))
        assert not many[-1].ended.is_set()
        await ground.wait(busy, many[-1])

    running(gpus, scenario)


def test_submitting_does_not_wait_and_tickets_come_in_their_order(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(8 * MIB)
        handle = await ground.allocate(channel, 8 * MIB)
        with ground.stalled():
            first, second = (ground.submit(channel, work.range(handle)) for _ in range(2))
            assert (first.ticket, second.ticket) == (1, 2)
            await until(lambda: first.progress().state == "running")
            assert second.progress().state == "waiting"
            found = await ground.channels.synchronize(ground.me, channel.id, 1, 0.05)
            assert (found.state, found.total) == ("running", 8 * MIB)
        assert (await ground.wait(channel, second)).state == "done"
        assert first.progress().state == "done"

    running(gpus, scenario)


def test_a_watch_tells_how_it_goes_until_nothing_is_left(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(2 * PIECE + 5)
        handle = await ground.allocate(channel, work.size)
        with ground.stalled():
            transfers = [ground.submit(channel, work.range(handle)) for _ in range(2)]
        views = [view async for view in ground.channels.watch(ground.me, channel.id, 0)]
        assert [each.ticket for each in views[0]] == [1, 2]
        assert [each.state for each in views[-1]] == ["done", "done"]
        done = [view[0].done for view in views]
        assert done == sorted(done)
        assert views[-1][0].rate > 0
        alone = [view async for view in ground.channels.watch(ground.me, channel.id, transfers[1].ticket)]
        assert [[each.ticket for each in view] for view in alone] == [[2]]
        assert [view async for view in ground.channels.watch(ground.me, channel.id, 0)] == []

    running(gpus, scenario)


def test_a_range_that_is_not_within_what_is_had_moves_nothing(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(4096)
        handle = await ground.allocate(channel, 1000)
        ours = await ground.lending.take(4096)
        good = Range(True, work.id, 0, handle, 0, 1000)

        async def refused(*ranges: Range) -> str:
            return await slug(lambda: ground.submit(channel, *ranges))

        assert await refused() == "BAD_COPY"
        assert await refused(*[good] * (MAX_COPIES + 1)) == "BAD_COPY"
        assert await refused(good, Range(True, work.id, 0, handle, 0, 0)) == "BAD_COPY"
        assert await refused(good, Range(True, work.id, 0, handle + 1, 0, 1)) == "NO_ALLOCATION"
        assert await refused(good, Range(True, work.id, 0, handle, 1, 1000)) == "DEVICE_RANGE"
        assert await refused(good, Range(True, work.id, 0, handle, 1 << 64, 1)) == "DEVICE_RANGE"
        assert await refused(good, Range(True, work.id, 3097, handle, 0, 1000)) == "LEASE_RANGE"
        assert await refused(good, Range(True, work.id, 1 << 64, handle, 0, 1)) == "LEASE_RANGE"
        assert await refused(good, Range(True, ours.id, 0, handle, 0, 1)) == "LEASE_KIND"
        assert await refused(good, Range(True, bytes(16), 0, handle, 0, 1)) == "NO_LEASE"
        assert channel.tally.to_device == 0
        assert (await ground.copy(channel, *[good] * MAX_COPIES)).done == MAX_COPIES * 1000
        assert await slug(ground.allocate(channel, 0)) == "BAD_SIZE"
        assert await slug(ground.channels.synchronize(ground.me, channel.id, 99, 1.0)) == "NO_TRANSFER"
        await ground.channels.free(ground.me, channel.id, handle)
        assert await refused(good) == "NO_ALLOCATION"
        assert await slug(ground.channels.free(ground.me, channel.id, handle)) == "NO_ALLOCATION"
        ours.close()

    running(gpus, scenario)


def test_every_limit_holds_and_what_ended_counts_no_more(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channels = [await ground.open() for _ in range(2)]
        assert await slug(ground.open()) == "TRANSFER_CHANNELS"
        first, second = channels
        handle = await ground.allocate(first, 3 * MIB)
        assert await slug(ground.allocate(second, MIB + 1)) == "DEVICE_MEMORY"
        await ground.allocate(second, MIB)
        await ground.channels.free(ground.me, first.id, handle)
        work, handle = await ground.lease(MIB), await ground.allocate(first, 3 * MIB)
        with ground.stalled():
            for number in range(4):
                ground.submit(first, work.range(handle))
                assert len(first.pending) == number + 1
            assert await slug(lambda: ground.submit(first, work.range(handle))) == "TRANSFER_QUEUE"
        await until(lambda: not first.pending)
        await ground.copy(first, work.range(handle))
        for channel in channels:
            await ground.channels.close(ground.me, channel.id)
        again = await ground.open()
        await ground.allocate(again, 4 * MIB)

    running(gpus, scenario, limits=ChannelLimits(8, 2, 4, 4 * MIB))


def test_a_caller_opens_only_so_many_channels_a_minute(gpus: GpuProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgpu_agent.domain.channels.OPENS_PER_MINUTE", 2)

    async def scenario(ground: Ground) -> None:
        for _ in range(2):
            await ground.channels.close(ground.me, (await ground.open()).id)
        assert await slug(ground.open()) == "TRANSFER_CHANNELS"
        assert len(ground.events("channel")) == 2

    running(gpus, scenario)


def test_a_channel_that_is_over_keeps_no_other_from_being_opened(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        first, second = await ground.open(), await ground.open()
        ground.channels._faulted(first, AgentError("SLOT_ALTERED", "for a test"))
        assert await slug(ground.allocate(first, 1)) == "SLOT_ALTERED"
        third = await ground.open()
        assert await slug(ground.allocate(first, 1)) == "NO_CHANNEL"
        assert await slug(ground.open()) == "TRANSFER_CHANNELS"
        assert ground.channels.all_of(ground.me) == [second, third]

    running(gpus, scenario, limits=ChannelLimits(8, 2, 4, MIB))


def test_one_channel_takes_only_so_many_transfers(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(4096)
        handle = await ground.allocate(channel, 4096)
        with ground.stalled():
            for _ in range(_QUEUED):
                ground.submit(channel, work.range(handle))
            assert await slug(lambda: ground.submit(channel, work.range(handle))) == "TRANSFER_QUEUE"
        await until(lambda: not channel.pending)
        assert channel.tally.transfers == _QUEUED

    running(gpus, scenario, limits=ChannelLimits(8, 2, 1000, MIB))


def test_a_gpu_that_has_no_room_says_so_and_the_channel_lives(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel = await ground.open()
        assert await slug(ground.allocate(channel, 1 << 29)) == "DEVICE_MEMORY"
        assert await ground.allocate(channel, MIB)

    running(gpus, scenario, limits=ChannelLimits(8, 2, 1000, 1 << 30))


def test_opening_and_ending_are_on_record(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(gpu=1), await ground.lease(MIB)
        (opened,) = ground.events("channel")
        assert opened.data["caller"] == ground.me.caller.claims()
        assert (opened.data["gpu"], opened.data["simulated"]) == (ground.uuids[1], True)
        await ground.put(channel, work, b"text")
        await ground.channels.close(ground.me, channel.id)
        (ended,) = ground.events("channel-ended")
        assert ended.data == {
            "errors": 0,
            "from_device": 0,
            "of": opened.sequence,
            "reason": "CLOSED",
            "to_device": 4,
            "transfers": 1,
        }
        assert await slug(ground.allocate(channel, 1)) == "NO_CHANNEL"

    running(gpus, scenario)


def test_without_its_record_no_channel_is_opened_and_nothing_is_left(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        audit = ground.channels._audit
        ground.channels._audit = None
        assert await slug(ground.open()) == "AUDIT_UNAVAILABLE"
        ground.channels._audit = audit
        folder = ground.lending.log.parent
        folder.rename(folder.with_name("elsewhere"))
        assert await slug(ground.open()) == "AUDIT_UNAVAILABLE"
        folder.with_name("elsewhere").rename(folder)
        await ground.ended()
        assert len(ground.channels) == 0
        for _ in range(LIMITS.channels_per_uid):
            await ground.open()

    running(gpus, scenario)


@pytest.mark.parametrize("size", [0, 1, 4096 - 56, 100_000, (4 << 20) + 1, (9 << 20) + 5])
def test_a_sealed_object_is_loaded_whole(gpus: GpuProcess, size: int) -> None:
    async def scenario(ground: Ground) -> None:
        channel, plain = await ground.open(), os.urandom(size)
        handle = await ground.allocate(channel, max(1, size))
        transfer = await ground.load(channel, sealed(plain), handle)
        assert transfer.total == size
        found = await ground.wait(channel, transfer)
        assert (found.state, found.done) == ("done", size)
        if size:
            assert await asyncio.to_thread(ground.peek, channel, handle, size) == plain
        (record,) = ground.events("key")
        assert (record.data["how"], record.data["gpu"]) == ("load", ground.uuids[0])
        assert (record.data["object"], record.data["policies"]) == (NAME.object_id, ["load"])
        await ground.lending.idle()

    running(gpus, scenario)


def test_each_piece_waits_for_the_turn_of_its_uid(gpus: GpuProcess) -> None:
    class Watched(Cores):
        turns: ClassVar[list[int]] = []

        @contextlib.contextmanager
        def turn(self, uid: int, require: Callable[[], None]) -> Iterator[None]:
            with super().turn(uid, require):
                self.turns.append(uid)
                yield

    async def scenario(ground: Ground) -> None:
        ground.channels._cores = Watched()
        channel, work = await ground.open(), await ground.lease(20 * MIB)
        await ground.put(channel, work, os.urandom(PIECE + 1))
        assert Watched.turns == [os.getuid()] * 2
        handle = await ground.allocate(channel, 9 << 20)
        await ground.wait(channel, await ground.load(channel, sealed(os.urandom(9 << 20)), handle))
        assert Watched.turns == [os.getuid()] * 5

    running(gpus, scenario)


def test_an_object_that_does_not_fit_is_not_loaded(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channel = await ground.open()
        handle = await ground.allocate(channel, 99)
        assert await slug(ground.load(channel, sealed(bytes(100)), handle)) == "DEVICE_RANGE"
        assert await slug(ground.load(channel, sealed(bytes(9)), handle + 1)) == "NO_ALLOCATION"
        assert await slug(ground.load(channel, b"no object", handle)) == "TRUNCATED"
        keys = len(ground.events("key"))
        with contextlib.closing(await ground.lending.take(1, ground.lending.file(sealed(b"x")))) as taken:
            me, begin = ground.me, ground.lending.begin
            call = ground.loading.load(me.caller, me, channel.id, taken.id, NAME, 12345, handle, begin)
            assert await slug(call) == "BAD_SEGMENT_SIZE"
        assert len(ground.events("key")) == keys  # nothing was released for that
        assert channel.tally.to_device == 0
        work = await ground.lease(99)
        await ground.copy(channel, work.range(handle, to_device=False))  # nothing secret came there
        work.taken.close()
        await ground.lending.idle()

    running(gpus, scenario)


def test_the_speed_is_of_the_last_second_and_of_channels_that_are_over_too(gpus: GpuProcess) -> None:
    async def scenario(ground: Ground) -> None:
        channels, clock = ground.channels, MovableClock()
        channels._clock, channels._sample = clock, (clock.monotonic(), 0)
        channel, work = await ground.open(), await ground.lease(4 * MIB)
        await ground.put(channel, work, bytes(4 * MIB))
        assert channels.speed == 0  # not a second has passed
        clock.pass_by(2.0)
        assert channels.speed == 2 * MIB
        await channels.close(ground.me, channel.id)
        clock.pass_by(4.0)
        assert channels.speed == 0
        assert channels.moved == (4 * MIB, 0)

    running(gpus, scenario)
