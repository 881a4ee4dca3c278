"""Memory of NVIDIA's GPUs by the real cuda-bindings, over a library with libcuda's ABI that copies when it likes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cgpu_agent.backends.devicememory import DeviceChannel, DeviceMemory, TransferGpus
from cgpu_agent.backends.gpu.cudachannel import SLOT, CudaChannel
from cgpu_agent.backends.gpu.cudamemory import CudaMemory
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.errors import DeviceFault, Exhausted, Unavailable
from fixtures.cuda import PATIENCE, FakeCuda, Owner, eventually, fake_cuda
from fixtures.cudacontract import CudaMemoryContract, refused
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


class TestOverALibraryOfOurs(CudaMemoryContract):
    pass


def test_a_write_returns_when_it_is_in_device_memory(cuda: FakeCuda, owner: Owner, channel: CudaChannel) -> None:
    handle = owner.allocate(64)
    cuda.delay(20_000)
    channel.write(handle, 0, SECRET)
    assert cuda.holds(SECRET, device=True, freed=False)


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


def test_what_packed_copies_went_by_way_of_is_wiped_too(cuda: FakeCuda, owner: Owner) -> None:
    channel, handle = owner.channel(), owner.allocate(128)
    channel.write_many([(handle, 0, SECRET), (handle, 64, SECRET)])
    owner.free(handle)
    assert cuda.holds(SECRET, device=True, freed=False)
    channel.close()
    assert not cuda.holds(SECRET, device=True, freed=True)
    assert cuda.count("allocations") == 0


def test_packed_copies_need_no_room_on_the_device(cuda: FakeCuda, owner: Owner, channel: CudaChannel) -> None:
    cuda.capacity(SLOT)
    handle = owner.allocate(128)
    channel.write_many([(handle, 0, SECRET), (handle, 64, SECRET)])
    assert owner.read(channel, handle, 128) == 2 * (SECRET + bytes(32))
    assert cuda.count("allocations") == 1


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


@pytest.mark.parametrize("size", [0, -1, 1 << 20, 1 << 48, 1 << 64])
def test_refuses_what_there_is_no_room_for(cuda: FakeCuda, owner: Owner, size: int) -> None:
    cuda.capacity(1 << 19)
    assert refused(lambda: owner.allocate(size), Exhausted) == "DEVICE_MEMORY"
    owner.free(owner.allocate(1 << 19))


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
