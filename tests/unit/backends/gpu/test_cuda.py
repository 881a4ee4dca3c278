"""Memory of NVIDIA's GPUs by the real cuda-bindings, over a library with libcuda's ABI that copies when it likes."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cgpu_agent.backends.devicememory import MAX_PACKED_COPY, DeviceChannel, DeviceMemory, TransferGpus
from cgpu_agent.backends.gpu.cudachannel import SLOT, CudaChannel
from cgpu_agent.backends.gpu.cudamemory import MAX_CHANNELS, CudaMemory
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.errors import AgentError, DeviceFault, Exhausted, Misuse, Unavailable
from fixtures.cuda import PATIENCE, FakeCuda, Owner, eventually, fake_cuda
from fixtures.nvml import fake_driver, uuid_of

SECRET = bytes.fromhex("6b65792d6f662d736f6d65626f64792d2d7730726b6c3061642d2d2d2d2d2d21")


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as cuda:
        yield cuda
        assert cuda.count("faults") == 0
        assert cuda.count("synchronous") == 0
        assert cuda.count("left") == 0
        eventually(cuda.has_nothing)


@pytest.fixture
def owner(cuda: FakeCuda) -> Iterator[Owner]:
    owner = Owner.of()
    yield owner
    cuda.pause(on=False)
    owner.end()


@pytest.fixture
def channel(owner: Owner) -> CudaChannel:
    return owner.channel()


def refused(call: Callable[[], object], kind: type[AgentError] = Misuse) -> str:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.slug


@pytest.mark.parametrize("size", [1, SLOT - 1, SLOT, SLOT + 1, 3 * SLOT + 5])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_written_is_read(
    owner: Owner, channel: CudaChannel, kind: Callable[[bytes], bytes], size: int
) -> None:
    handle = owner.allocate(size + 14)
    content = os.urandom(size)
    channel.write(handle, 7, kind(content))
    assert owner.read(channel, handle, size + 14) == bytes(7) + content + bytes(7)


def test_a_write_returns_when_it_is_in_device_memory(cuda: FakeCuda, owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(64)
    cuda.delay(20_000)
    channel.write(handle, 0, SECRET)
    assert cuda.holds(SECRET, device=True, freed=False)


def test_small_copies_are_made_in_their_order(owner: Owner, channel: CudaChannel) -> None:
    handle, other = owner.allocate(16), owner.allocate(4)
    channel.write_many(
        [(handle, 0, b"aaaa"), (handle, 2, bytearray(b"bbbb")), (other, 0, b"cccc"), (handle, 3, b"d")]
    )
    assert owner.read(channel, handle, 16) == b"aabdbb" + bytes(10)
    assert owner.read(channel, other, 4) == b"cccc"


def test_small_copies_that_fill_many_buffers(owner: Owner, channel: CudaChannel) -> None:
    pieces = [os.urandom(MAX_PACKED_COPY - number % 5) for number in range(3 * SLOT // MAX_PACKED_COPY)]
    handle = owner.allocate(len(pieces) * MAX_PACKED_COPY)
    channel.write_many([(handle, number * MAX_PACKED_COPY, piece) for number, piece in enumerate(pieces)])
    for number, piece in enumerate(pieces):
        assert owner.read(channel, handle, len(piece), number * MAX_PACKED_COPY) == piece


def test_two_channels_at_once_keep_apart(owner: Owner) -> None:
    size = 4 * SLOT + 3

    def work(_: int) -> bool:
        channel = owner.channel()
        handle = owner.allocate(size)
        for _ in range(3):
            content = os.urandom(size)
            channel.write(handle, 0, content)
            if owner.read(channel, handle, size) != content:
                return False
        channel.close()
        owner.free(handle)
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


def test_calls_of_one_channel_take_turns(owner: Owner, channel: CudaChannel) -> None:
    handles = [owner.allocate(SLOT + 1) for _ in range(3)]
    contents = [os.urandom(SLOT + 1) for _ in handles]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda pair: channel.write(pair[0], 0, pair[1]), zip(handles, contents, strict=True)))
        assert list(pool.map(lambda handle: owner.read(channel, handle, SLOT + 1), handles)) == contents


def test_the_gpu_is_chosen_by_its_uuid(cuda: FakeCuda) -> None:
    for order in ((3, 7), (7, 3)):
        cuda.plug(*map(uuid_of, order))
        owner = Owner.of(7)
        assert cuda.chosen() == order.index(7)
        owner.end()


def test_a_gpu_that_is_not_there_or_there_twice_is_none(cuda: FakeCuda) -> None:
    assert refused(lambda: Owner.of(5), DeviceFault) == "GPU_LOST"
    cuda.plug(uuid_of(5), uuid_of(5))
    assert refused(lambda: Owner.of(5), DeviceFault) == "GPU_ERROR"
    cuda.plug(*map(uuid_of, range(65)))
    assert refused(lambda: Owner.of(5), DeviceFault) == "GPU_ERROR"


def test_each_owner_has_a_context_and_handles_of_his_own(cuda: FakeCuda, owner: Owner, channel: CudaChannel) -> None:
    other = Owner.of()
    try:
        assert cuda.count("contexts") == 2
        handle = other.allocate(8)
        assert refused(lambda: channel.write(handle, 0, b"x")) == "NO_ALLOCATION"
        assert refused(lambda: owner.free(handle)) == "NO_ALLOCATION"
    finally:
        other.end()


def test_fresh_memory_is_all_zeros(owner: Owner, channel: CudaChannel) -> None:
    assert owner.read(channel, owner.allocate(SLOT + 9), SLOT + 9) == bytes(SLOT + 9)


def test_freed_memory_is_wiped_first(cuda: FakeCuda, owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(4096)
    channel.write(handle, 1000, SECRET)
    owner.free(handle)
    assert cuda.count("allocations") == 0
    assert not cuda.holds(SECRET, device=True, freed=True)


def test_a_closed_channels_buffers_are_wiped_and_given_back(cuda: FakeCuda, owner: Owner) -> None:
    channel = owner.channel()
    handle = owner.allocate(64)
    channel.write(handle, 0, SECRET)
    assert owner.read(channel, handle, 32) == SECRET
    assert cuda.holds(SECRET, device=False, freed=False)
    channel.close()
    channel.close()
    assert not cuda.holds(SECRET, device=False, freed=True)
    assert [cuda.count(what) for what in ("pinned", "streams", "events")] == [0, 0, 0]
    assert refused(lambda: channel.write(handle, 0, b"x"), Unavailable) == "TRANSFER_DEAD"


def test_the_end_wipes_and_gives_back_everything(cuda: FakeCuda) -> None:
    owner = Owner.of()
    channel, handle = owner.channel(), owner.allocate(64)
    owner.allocate(1)
    channel.write(handle, 0, SECRET)
    owner.end()
    assert cuda.has_nothing()
    assert not any(cuda.holds(SECRET, device=device, freed=True) for device in (True, False))
    assert refused(lambda: owner.allocate(1), DeviceFault) == "GPU_CLOSED"
    assert refused(lambda: channel.write(handle, 0, b"x"), Unavailable) == "TRANSFER_DEAD"


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 101), (1, 100), (100, 1), (-1, 1), (1 << 63, 1), ((1 << 64) - 1, 1), (1 << 64, 1)]
)
def test_refuses_a_range_that_is_not_within_the_allocation(
    cuda: FakeCuda, owner: Owner, channel: CudaChannel, offset: int, size: int
) -> None:
    handle = owner.allocate(100)
    good = (handle, 0, b"written first")
    assert refused(lambda: channel.write(handle, offset, bytes(size))) == "DEVICE_RANGE"
    assert refused(lambda: channel.read_into(handle, offset, bytearray(size))) == "DEVICE_RANGE"
    assert refused(lambda: channel.write_many([good, (handle, offset, bytes(size))])) == "DEVICE_RANGE"
    assert channel.dead is None
    assert owner.read(channel, handle, 100) == bytes(100)


@pytest.mark.parametrize("handle", [0, -1, 2, 1 << 32, 1 << 64])
def test_refuses_a_handle_that_nothing_has(owner: Owner, channel: CudaChannel, handle: int) -> None:
    owner.allocate(8)
    assert refused(lambda: channel.write(handle, 0, b"x")) == "NO_ALLOCATION"
    assert refused(lambda: channel.read_into(handle, 0, bytearray(1))) == "NO_ALLOCATION"
    assert refused(lambda: owner.free(handle)) == "NO_ALLOCATION"
    assert channel.dead is None


def test_a_handle_is_never_anothers_afterwards(owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(8)
    owner.free(handle)
    assert owner.allocate(8) != handle
    assert refused(lambda: channel.write(handle, 0, b"x")) == "NO_ALLOCATION"
    assert refused(lambda: owner.free(handle)) == "NO_ALLOCATION"


def test_refuses_what_is_no_copy(owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(2 * MAX_PACKED_COPY)
    assert refused(lambda: channel.write(handle, 0, b"")) == "BAD_COPY"
    assert refused(lambda: channel.read_into(handle, 0, bytearray())) == "BAD_COPY"
    assert refused(lambda: channel.write_many([(handle, 0, b"")])) == "BAD_COPY"
    assert refused(lambda: channel.write_many([(handle, 0, bytes(MAX_PACKED_COPY + 1))])) == "BAD_COPY"
    assert channel.dead is None


@pytest.mark.parametrize("size", [0, -1, 1 << 20, 1 << 48, 1 << 64])
def test_refuses_what_there_is_no_room_for(cuda: FakeCuda, owner: Owner, size: int) -> None:
    cuda.capacity(1 << 19)
    assert refused(lambda: owner.allocate(size), Exhausted) == "DEVICE_MEMORY"
    owner.free(owner.allocate(1 << 19))


def test_allocations_and_channels_are_bounded(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner.memory._rooms, "_limit", 2)
    handles = [owner.allocate(1) for _ in range(2)]
    assert refused(lambda: owner.allocate(1), Exhausted) == "DEVICE_MEMORY"
    owner.free(handles[0])
    owner.allocate(1)
    channels = [owner.channel() for _ in range(MAX_CHANNELS)]
    assert refused(owner.channel, Exhausted) == "TRANSFER_CHANNELS"
    channels[3].close()
    owner.channel()


def test_no_reference_to_a_buffer_is_kept(owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(SLOT + 1)
    source, out = bytearray(SLOT + 1), bytearray(SLOT + 1)
    channel.write(handle, 0, source)
    channel.write_many([(handle, 0, source[:9])])
    channel.read_into(handle, 0, out)
    source.append(1)  # a bytearray that somebody still looks into cannot grow
    out.append(1)
    channel.stop()
    refused(lambda: channel.write(handle, 0, source), Unavailable)
    gc.collect()  # the exception and its traceback
    source.append(1)


def test_what_is_freed_while_it_is_written_to_takes_no_more(
    cuda: FakeCuda, owner: Owner, channel: CudaChannel
) -> None:
    size = 16 * SLOT
    handle, content = owner.allocate(size), SECRET * (size // len(SECRET))
    cuda.delay(5_000)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(channel.write, handle, 0, content)
        eventually(lambda: cuda.holds(SECRET, device=True, freed=False))
        owner.free(handle)
        assert refused(writing.result) == "NO_ALLOCATION"
    assert not cuda.holds(SECRET, device=True, freed=True)
    assert channel.dead is None
    again = owner.allocate(8)
    channel.write(again, 0, b"it lives")
    assert owner.read(channel, again, 8) == b"it lives"


def test_what_is_freed_while_it_is_read_gives_no_more(cuda: FakeCuda, owner: Owner, channel: CudaChannel) -> None:
    size = 16 * SLOT
    handle = owner.allocate(size)
    channel.write(handle, 0, b"1" * size)
    cuda.delay(5_000)
    out = bytearray(size)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(channel.read_into, handle, 0, out)
        eventually(lambda: out[0] != 0)
        owner.free(handle)
        assert refused(reading.result) == "NO_ALLOCATION"
    assert set(out) == {0, ord("1")}


def test_memory_under_a_copy_that_does_not_end_is_not_freed_and_can_be_later(
    cuda: FakeCuda, owner: Owner, channel: CudaChannel
) -> None:
    handle = owner.allocate(64)
    cuda.pause()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(channel.write, handle, 0, SECRET)
        eventually(lambda: cuda.holds(SECRET, device=False, freed=False))
        assert refused(lambda: owner.free(handle, timeout=0.2), DeviceFault) == "GPU_TIMEOUT"
        assert cuda.count("allocations") == 1
        cuda.pause(on=False)
        writing.result()
    assert refused(lambda: channel.write(handle, 0, b"x")) == "NO_ALLOCATION"
    owner.free(handle)
    assert not cuda.holds(SECRET, device=True, freed=True)


def test_a_stopped_channel_gives_up_soon_and_no_other_does(
    cuda: FakeCuda, owner: Owner, channel: CudaChannel
) -> None:
    other, handle = owner.channel(), owner.allocate(32 * SLOT)
    cuda.delay(10_000)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(channel.write, handle, 0, SECRET * (SLOT // len(SECRET)) * 32)
        eventually(lambda: cuda.holds(SECRET, device=True, freed=False))
        channel.stop()
        assert refused(writing.result, Unavailable) == "TRANSFER_STOPPED"
    assert channel.dead is not None
    assert channel.dead.slug == "TRANSFER_STOPPED"
    assert refused(lambda: channel.write(handle, 0, b"x"), Unavailable) == "TRANSFER_DEAD"
    assert owner.read(other, handle, 1, 32 * SLOT - 1) == bytes(1)


def test_a_channel_stopped_between_two_calls_makes_no_other(owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(8)
    channel.stop()
    assert refused(lambda: channel.write(handle, 0, b"x"), Unavailable) == "TRANSFER_STOPPED"
    assert refused(lambda: channel.write(handle, 0, b"x"), Unavailable) == "TRANSFER_DEAD"


def test_closing_waits_for_who_is_using_the_channel(cuda: FakeCuda, owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(8 * SLOT)
    cuda.delay(10_000)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(channel.write, handle, 0, SECRET * (SLOT // len(SECRET)) * 8)
        eventually(lambda: cuda.holds(SECRET, device=True, freed=False))
        channel.close()
        assert not cuda.holds(SECRET, device=False, freed=True)
        assert refused(writing.result, Unavailable) == "TRANSFER_STOPPED"


def test_the_end_stops_channels_that_nobody_closed(cuda: FakeCuda) -> None:
    owner = Owner.of()
    channel, handle = owner.channel(), owner.allocate(16 * SLOT)
    cuda.delay(10_000)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(channel.write, handle, 0, SECRET * (SLOT // len(SECRET)) * 16)
        eventually(lambda: cuda.holds(SECRET, device=True, freed=False))
        owner.end()
        assert refused(writing.result, Unavailable) == "TRANSFER_STOPPED"
    assert cuda.has_nothing()
    assert not any(cuda.holds(SECRET, device=device, freed=True) for device in (True, False))


def test_a_call_that_is_cut_short_ends_the_channel(owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(8)
    with pytest.raises(TypeError):
        channel.read_into(handle, 0, memoryview(bytes(8)))
    assert channel.dead is not None
    assert channel.dead.slug == "TRANSFER_DEAD"
    owner.free(handle)


def test_the_gpus_of_the_driver_offer_it(cuda: FakeCuda, tmp_path: Path) -> None:
    async def scenario(gpus: TransferGpus) -> None:
        memory: DeviceMemory = await gpus.establish_transfers(uuid_of(0), timeout=PATIENCE)
        assert memory.chain is None
        handle = await memory.allocate(32, timeout=PATIENCE)
        channel: DeviceChannel = await memory.channel(timeout=PATIENCE)
        assert channel.locked
        channel.write(handle, 0, SECRET)
        out = bytearray(32)
        channel.read_into(handle, 0, out)
        assert out == SECRET
        channel.close()
        await memory.free(handle, timeout=PATIENCE)
        await memory.end(timeout=PATIENCE)

    with fake_driver(tmp_path) as driver:
        gpus = NvmlGpus(sysfs=driver.sysfs)
        asyncio.run(scenario(gpus))
        gpus.close()
        assert refused(lambda: asyncio.run(scenario(gpus)), DeviceFault) == "GPU_CLOSED"


def test_threads_are_gone_with_their_owner(cuda: FakeCuda) -> None:
    Owner.of().end()
    eventually(lambda: not any(thread.name == "gpu-memory" for thread in threading.enumerate()))
    assert refused(lambda: asyncio.run(CudaMemory.establish(uuid_of(9), timeout=PATIENCE)), DeviceFault) == "GPU_LOST"
    eventually(lambda: not any(thread.name == "gpu-memory" for thread in threading.enumerate()))
